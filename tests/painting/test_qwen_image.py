"""From prompt and pictures to velocities as diffusers' Qwen-Image pipelines compute them.

Weights are random and small, in their published layout; the connector is fresh, which is the
identity, and the kontext is hidden: what is left is what public weights were trained with.
"""

import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from qk_jax.data import prompts, templates
from qk_jax.diffusion import sampler
from qk_jax.models import query_kontext, qwen_vl, rotary
from qk_jax.pictures.roles import REFERENCE, SOURCE
from qk_jax.weights import write
from tests.painting.painters import TOKENIZER
from tests.weights import nano

SIDE = 112  # of the square that has the area of a picture in the text encoder
SPECIAL = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
PROMPTS = ("a fox", "a red fox that sleeps under an old tree beside a small blue house at night")
PICTURES = ((64, 64), (32, 96))  # (height, width): each is its own size for the autoencoder


@functools.cache
def model(zero_cond_t):
    """(model, all parameters) of nano size, the connector fresh."""
    tiny = qwen_vl.PRESETS["tiny"]
    vlm = dataclasses.replace(
        nano.VLM,
        text=dataclasses.replace(nano.VLM.text, vocab_size=tiny.text.vocab_size),
        **{name: getattr(tiny, name) for name in SPECIAL},
    )
    config = query_kontext.ModelConfig(
        vlm=vlm,
        mmdit=dataclasses.replace(
            nano.MMDIT, joint_attention_dim=vlm.text.hidden_size, zero_cond_t=zero_cond_t
        ),
        vae=nano.QWEN_VAE,
        num_queries=3,
        max_text=40,
        vlm_pixels=SIDE * SIDE,
        law=rotary.PositionLaw("qwen_image"),
        condition_latents=True,
        keep_tail=True,
        picture_multiple=32,
    )
    ours = query_kontext.QueryKontext(config)
    params = ours.init(jax.random.key(0), ("queries", "connector"))
    for seed, part in enumerate(("vlm", "mmdit", "vae")):
        shapes = nano.read.shapes(getattr(config, part))
        params[part] = nano.random_tree(shapes, seed)
    return ours, params


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(zero_cond_t) -> the parts of diffusers' pipelines."""

    @functools.cache
    def parts(zero_cond_t):
        folder = tmp_path_factory.mktemp("parts")
        ours, params = model(zero_cond_t)
        loaded = {}
        for part, name in (("vlm", "text_encoder"), ("mmdit", "transformer"), ("vae", "vae")):
            config = getattr(ours.config, part)
            write.export_model(params[part], config, folder / part, jnp.float32)
            kind = {"vlm": nano._vlm, "vae": nano._vae}.get(part, lambda _: nano.KINDS["mmdit"])
            loaded[name] = nano.load(kind(config), folder / part)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            sampler.ScheduleConfig().to_hf()
        )
        loaded["text_encoder"].forward = with_picture_tokens(loaded["text_encoder"])
        tokenizer = prompts.load_tokenizer(TOKENIZER)
        return loaded | {"scheduler": scheduler, "tokenizer": tokenizer}

    return parts


def with_picture_tokens(encoder):
    """transformers 5 has M-RoPE only where it is told which tokens are pictures, which diffusers'
    pipelines do not do (diffusers issue 14194); the weights were released against 4."""
    forward, image = encoder.forward, encoder.config.image_token_id

    def told(input_ids, **kwargs):
        return forward(input_ids, mm_token_type_ids=(input_ids == image).int(), **kwargs)

    return told


@dataclasses.dataclass
class Processor:
    """Qwen2VLProcessor without its video processor, which needs torchvision."""

    tokenizer: object

    def __call__(self, text, images, **kwargs):
        seen = Qwen2VLImageProcessorPil()(images, return_tensors="pt")
        counts = [int(grid.prod()) // 4 for grid in seen["image_grid_thw"]]
        texts = []
        for one in text:
            for count in counts:
                one = one.replace("<|image_pad|>", "<|slot|>" * count, 1)
            texts.append(one.replace("slot", "image_pad"))
        words = self.tokenizer(texts, **kwargs)
        return type(words)({**words, **seen})


def velocities(transformer):
    """The list to which every call of `transformer` will add its output."""
    found = []
    transformer.register_forward_hook(lambda *call: found.append(call[-1][0]))
    return found


def ours_at(ours, params, batch, noise, sigma, grid, latents=()):
    """Our velocity without a kontext."""
    context, mask = ours.context(params, batch)
    mask = mask.at[:, -ours.config.num_queries :].set(False)
    t = jnp.full(len(noise), sigma, jnp.float32)
    return ours.velocity(params, noise, t, context, mask, grid, latents, batch["roles"])


def opening(template, pictures):
    """Tokens that the pipeline drops: 34 and 64 with Qwen's tokenizer."""
    tokenizer = prompts.load_tokenizer(TOKENIZER)
    return len(tokenizer(template.opening(pictures))["input_ids"])


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_text_to_image_equals_the_pipeline(folders, zero_cond_t):
    """Two prompts of different length in one batch, at every step of three."""
    ours, params = model(zero_cond_t)
    template = templates.PRESETS["qwen_image"]
    pipe = diffusers.QwenImagePipeline(**folders(zero_cond_t))
    assert template.opening(False) + "{}" + templates.TAIL == pipe.prompt_template_encode
    pipe.prompt_template_encode_start_idx = opening(template, False)
    pipe.set_progress_bar_config(disable=True)
    found = velocities(pipe.transformer)
    grid = (2, 3)
    noise = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    states = []
    pipe(
        list(PROMPTS), height=32, width=48, num_inference_steps=3, true_cfg_scale=1.0,
        latents=torch.from_numpy(noise), output_type="latent",
        callback_on_step_end=lambda *call: states.append(call[-1]["latents"].numpy()) or {},
    )  # fmt: skip
    builder = builder_of(ours, template)
    batch = jax.tree.map(jnp.asarray, builder.batch(PROMPTS, [(), ()], [(), ()], [True, True]))
    sigmas = sampler.schedule(3, 6, sampler.ScheduleConfig())
    for x, sigma, theirs in zip([noise, *states], sigmas, found, strict=False):
        v = ours_at(ours, params, batch, jnp.asarray(x), sigma, grid)
        np.testing.assert_allclose(v, theirs, atol=2e-5, rtol=1e-5)


def builder_of(ours, template):
    config = ours.config
    return prompts.PromptBuilder(
        prompts.load_tokenizer(TOKENIZER), config.max_text, config.num_queries, config.vlm_pixels,
        template,
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["qwen_image", "qwen_image_edit_plus"])
@pytest.mark.parametrize(("sizes", "zero_cond_t"), [(PICTURES[1:], False), (PICTURES, True)])
def test_edits_equal_the_pipeline(folders, monkeypatch, preset, sizes, zero_cond_t):
    ours, params = model(zero_cond_t)
    template = templates.PRESETS[preset]
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", SIDE * SIDE)
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    parts = folders(zero_cond_t)
    pipe = diffusers.QwenImageEditPlusPipeline(**parts, processor=Processor(parts["tokenizer"]))
    assert template.opening(True) + "{}" + templates.TAIL == pipe.prompt_template_encode
    pipe.prompt_template_encode_start_idx = opening(template, True)
    pipe.set_progress_bar_config(disable=True)
    found = velocities(pipe.transformer)
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    noise = rng.normal(size=(1, 24, 16)).astype(np.float32)
    pipe(
        [Image.fromarray(picture) for picture in pictures], PROMPTS[1], height=64, width=96,
        num_inference_steps=2, true_cfg_scale=1.0, latents=torch.from_numpy(noise),
        output_type="latent",
    )  # fmt: skip
    roles = (SOURCE, REFERENCE)[: len(pictures)]
    batch = builder_of(ours, template).batch(PROMPTS[1:], [pictures], [roles], [True])
    batch = jax.tree.map(jnp.asarray, batch)
    latents = tuple(ours.encode_pictures(params, x) for x in batch["conditions"])
    v = ours_at(ours, params, batch, jnp.asarray(noise), 1.0, (4, 6), latents)
    np.testing.assert_allclose(v, found[0][:, :24], atol=2e-5, rtol=1e-5)
