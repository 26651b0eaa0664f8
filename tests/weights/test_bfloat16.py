"""Whole models in bfloat16 are as near to the float32 truth as PyTorch's own in bfloat16.

The weights are bfloat16 numbers, as in published files, and so are the inputs: what differs is the
rounding on the way. Distances are root mean squares relative to the truth, over several models with
other random weights.
"""

import dataclasses
import functools

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import qk_jax
from qk_jax.models import mmdit, qwen_vl, vae
from qk_jax.models.qwen_text import TextConfig
from qk_jax.models.qwen_vision import VisionConfig
from qk_jax.weights import hub_configs
from tests.models import torch_copy

SEEDS = range(3)
LIMIT = 1.2  # the same number of roundings in another order gives 1 within a few per cent
IMAGE = 90
GRIDS = ((8, 12), (6, 6))
VLM = qwen_vl.VLMConfig(
    text=TextConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, mrope_section=(4, 6, 6),
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    ),
    vision=VisionConfig(
        depth=4, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128,
        window_size=56, fullatt_block_indexes=(1, 3),
    ),
    image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
)  # fmt: skip
MMDIT = mmdit.MMDiTConfig(
    in_channels=16, out_channels=4, num_layers=6, attention_head_dim=32, num_attention_heads=4,
    joint_attention_dim=96, axes_dims_rope=(8, 12, 12),
)  # fmt: skip
KL = vae.AutoencoderKLConfig(
    block_out_channels=(16, 16, 32, 32), latent_channels=4, norm_num_groups=8, shift_factor=0.1,
    scaling_factor=0.4, layers_per_block=2,
)  # fmt: skip
QWEN_VAE = vae.QwenImageVAEConfig(
    base_dim=16, z_dim=4, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.1, 0.9, 2.0, 0.5)
)


def rounded(array):
    """The nearest bfloat16 numbers, as float32."""
    return np.asarray(array).astype(jnp.bfloat16).astype(np.float32)


def pair(kind, config, seed, folder):
    """(float32, bfloat16) PyTorch models with the same bfloat16 numbers; saved in `folder`."""

    def make():
        if kind is transformers.Qwen2_5_VLForConditionalGeneration:
            model = kind(transformers.Qwen2_5_VLConfig.from_dict(hub_configs.to_hf(config)))
        else:
            model = kind(
                **{k: v for k, v in hub_configs.to_hf(config).items() if not k.startswith("_")}
            )
        model = torch_copy.randomize(model.float().eval(), seed, scale=0.2)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.to(torch.bfloat16))
        return model

    half = make().to(torch.bfloat16)
    half.save_pretrained(folder)
    return make(), half


def floats(array, dtype):
    return torch.from_numpy(array).to(dtype)


def vlm_outputs(rng):
    """Functions of a PyTorch model and of ours to last hidden states at a batch of two rows."""
    ids = rng.integers(3, 89, (2, 64))
    place = 4
    for rows, columns in GRIDS:
        ids[:, place : place + rows * columns // 4] = IMAGE
        place += rows * columns // 4 + 3
    mask = np.ones_like(ids)
    ids[1, -9:], mask[1, -9:] = 0, 0
    thw = np.array([(1, *grid) for grid in GRIDS] * 2)
    pixels = rounded(rng.standard_normal((thw[:, 1:].prod(1).sum(), 1176)))
    kinds = torch.from_numpy((ids == IMAGE).astype(np.int32))

    def theirs(model):
        return model.model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            pixel_values=floats(pixels, model.dtype), image_grid_thw=torch.from_numpy(thw),
            mm_token_type_ids=kinds,
        ).last_hidden_state[torch.from_numpy(mask > 0)]  # fmt: skip

    return theirs, lambda model: model(ids, mask, pixels, thw)[mask > 0]


def mmdit_outputs(rng):
    """The same for velocities; t is a bfloat16 number, because diffusers rounds it to one."""
    shapes = [(1, 8, 12), (1, 6, 6)]
    hidden = rounded(rng.standard_normal((2, 132, MMDIT.in_channels)))
    context = rounded(rng.standard_normal((2, 24, MMDIT.joint_attention_dim)))
    mask = np.arange(24) < np.array([[24], [15]])
    time = np.array([0.75, 0.1875], np.float32)

    def theirs(model):
        return model(
            floats(hidden, model.dtype), floats(context, model.dtype), torch.from_numpy(mask),
            floats(time, model.dtype), [shapes] * 2,
        ).sample  # fmt: skip

    return theirs, lambda model: model(hidden, context, mask, time, [shapes] * 2)


def vae_outputs(config, decodes, rng):
    """The same for the posterior's mode, or for pictures of latents."""
    shape = (2, 8, 6, config.latent_channels) if decodes else (2, 64, 48, 3)
    x = rounded(rng.uniform(-1, 1, shape))
    frame = (slice(None), slice(None), 0) if config is QWEN_VAE else ()

    def theirs(model):
        given = floats(x.transpose(0, 3, 1, 2).copy(), model.dtype)
        given = given[:, :, None] if frame else given
        out = model.decode(given).sample if decodes else model.encode(given).latent_dist.mean
        return out[frame].permute(0, 2, 3, 1)

    def ours(model):
        if decodes:
            return model.decode(vae.normalize(jnp.asarray(x), config))
        return vae.denormalize(model.encode(x), config)

    return theirs, ours


CASES = {
    "Qwen2.5-VL": (
        transformers.Qwen2_5_VLForConditionalGeneration, VLM, qk_jax.load_vlm, vlm_outputs,
    ),
    "QwenImageTransformer2DModel": (
        diffusers.QwenImageTransformer2DModel, MMDIT, qk_jax.load_mmdit, mmdit_outputs,
    ),
    "QwenImageTransformer2DModel zero_cond_t": (
        diffusers.QwenImageTransformer2DModel, dataclasses.replace(MMDIT, zero_cond_t=True),
        qk_jax.load_mmdit, mmdit_outputs,
    ),
    **{
        f"{kind.__name__} {'decode' if decodes else 'encode'}": (
            kind, config, qk_jax.load_vae, functools.partial(vae_outputs, config, decodes),
        )
        for kind, config in (
            (diffusers.AutoencoderKL, KL), (diffusers.AutoencoderKLQwenImage, QWEN_VAE),
        )
        for decodes in (False, True)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_farther_from_the_truth_than_pytorch(case, tmp_path, record_property):
    kind, config, load, outputs = CASES[case]
    errors = {"ours": [], "theirs": []}
    for seed in SEEDS:
        exact, half = pair(kind, config, seed, tmp_path)
        theirs, ours = outputs(np.random.default_rng(seed))
        model = load(tmp_path)
        assert model.dtype == jnp.bfloat16
        with torch.no_grad():
            truth = theirs(exact).numpy()
            found = {"theirs": theirs(half).float().numpy()}
        found["ours"] = np.asarray(ours(model), np.float32)
        for name, value in found.items():
            errors[name].append(np.linalg.norm(value - truth) / np.linalg.norm(truth))
    distance = {name: float(np.sqrt(np.mean(np.square(e)))) for name, e in errors.items()}
    ratio = distance["ours"] / distance["theirs"]
    print(
        f"{case}: ours {distance['ours']:.4f}, PyTorch {distance['theirs']:.4f}, ratio {ratio:.2f}"
    )
    record_property("ratio", ratio)
    assert 0 < distance["theirs"] < 0.2, "this comparison says something about rounding only"
    assert ratio <= LIMIT
