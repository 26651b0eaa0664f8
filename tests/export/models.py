"""A random model of nano size with the tiny tokenizer, for the tests of exports."""

import dataclasses
import functools

import jax

from qk_jax import painting, sharding
from qk_jax.checkpoints import run_folder
from qk_jax.data import templates
from qk_jax.experiment.plan import Plan
from qk_jax.models import qwen_vl, rotary, vae
from qk_jax.weights.read import shapes_of
from tests.painting import painters
from tests.weights import nano

SHIFTED = rotary.PositionLaw()


@functools.cache
def loaded(
    law=SHIFTED, vae_kind="kl", latents=True, zero=True, prompt="query_kontext", switches=()
):
    """A random model of nano size with the tiny tokenizer, as if it had been read from a folder.

    switches: (name, value) of further fields of config.model.
    """
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vlm = dataclasses.replace(
        nano.VLM,
        text=dataclasses.replace(nano.VLM.text, vocab_size=2048),
        **{name: getattr(qwen_vl.PRESETS["tiny"], name) for name in special},
    )
    autoencoder = nano.KINDS[vae_kind].config
    config = painters.config("stage3").copy_and_resolve_references()
    with config.unlocked():
        config.model.vlm = dataclasses.asdict(vlm)
        config.model.mmdit = dataclasses.asdict(dataclasses.replace(nano.MMDIT, zero_cond_t=zero))
        config.model.vae = {"kind": vae.kind(autoencoder), **dataclasses.asdict(autoencoder)}
        config.model.law = dataclasses.asdict(law)
        config.model.update(num_queries=3, max_text=20, vlm_pixels=56 * 56)
        config.model.condition_latents = latents
        config.model.update(dict(switches))
        config.prompt = dataclasses.asdict(templates.preset(prompt))
        config.data.update(sizes=("64x64", "80x48", "48x80"), reference_size=48)
        config.lora.update(rank=2, alpha=1.0)
    plan = Plan.build(config, sharding.build_mesh({}, jax.devices()[:1]), check=False)
    params = nano.random_tree(shapes_of(plan.model.abstract()))
    return run_folder.Loaded(plan, params, 7, "unknown")


@functools.cache
def painter(*args, **kwargs):
    """The painter of `loaded`."""
    return painting.of_loaded(loaded(*args, **kwargs), batch=1)
