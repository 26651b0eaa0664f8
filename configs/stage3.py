"""Stage 3: pictures also reach the generator as VAE tokens, and it learns to edit and compose.

    python -m qk_jax.train --config stage3:tiny --workdir runs/tiny   # or configs/stage3.py:tiny

starts from <workdir>/stage2 and trains queries, connector and a LoRA on the frozen MMDiT, on
editing, customized generation and multi-subject composition, with some of the earlier tasks so
that they are not forgotten. The paper: rank 256, 30K steps at batch 512.
"""

from configs import common, recipes
from qk_jax.models import lora


def get_config(size: str = "tiny"):
    """The config at `size`, or at 'SIZE@SLICE' with the recipe for a slice (recipes.py)."""
    size, place = recipes.split(size)
    config = common.base("stage3", size)
    tiny = common.presets(size) == "tiny"
    config.steps = common.pick(size, tiny=750, tiny_long=4000, smoke=6, full=30_000)
    config.data.batch = common.pick(size, tiny=16, tiny_long=16, smoke=8, full=512)
    for entry in config.evals.values():
        entry.every = common.pick(size, tiny=250, tiny_long=1000, smoke=6, full=entry.every)
    config.data.tasks.text_to_image = 0.1
    config.data.tasks.reconstruction = 0.05
    config.data.tasks.transformation = 0.2
    config.data.tasks.editing = 0.3
    config.data.tasks.customization = 0.15
    config.data.tasks.composition = 0.2
    config.model.condition_latents = True
    config.lora.pattern = lora.MMDIT_TARGETS
    config.lora.rank = 64 if tiny else 256
    config.lora.alpha = 64.0 if tiny else 256.0
    config.optimizer.lr = 2e-3 if tiny else 1e-4
    config.optimizer.warmup = common.pick(size, tiny=20, tiny_long=100, smoke=2, full=500)
    config.optimizer.ema = 0.99 if tiny else 0.9999
    if tiny:  # the rate is the fresh adapter's
        config.optimizer.rates = ((r"lora/.*", 1.0), (r".*", 0.05))
    return recipes.apply(config, place)
