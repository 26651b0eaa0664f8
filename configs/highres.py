"""High resolution: stage 3 goes on at 1024 x 1024 for a short time.

    python -m qk_jax.train --config highres:7b --workdir runs/7b   # or configs/highres.py:7b

starts from <workdir>/stage3 with its LoRA and trains the same parts on the same tasks. The paper:
3,000 steps at batch 256 with a rate of 1e-5. tiny goes from 64 to 128 pixels.
"""

from configs import common, recipes, stage3
from qk_jax.data import buckets


def get_config(size: str = "tiny"):
    """The config at `size`, or at 'SIZE@SLICE' with the recipe for a slice (recipes.py)."""
    size, place = recipes.split(size)
    config = stage3.get_config(size)
    tiny = common.presets(size) == "tiny"
    config.stage = "highres"
    config.rules = common.STAGES["highres"].rules
    config.steps = common.pick(size, tiny=100, tiny_long=1000, smoke=20, full=3000)
    for entry in config.evals.values():
        entry.every = common.pick(size, tiny=50, tiny_long=500, smoke=20, full=1000)
    config.data.batch = 16 if tiny else 256
    config.data.sizes = ("128x128", "160x96", "96x160") if tiny else buckets.names(1024, 16)
    config.data.reference_size = 128 if tiny else 1024
    config.optimizer.lr = 2e-4 if tiny else 1e-5
    config.optimizer.schedule = "constant"
    config.optimizer.warmup = common.pick(size, tiny=10, tiny_long=50, smoke=2, full=100)
    return recipes.apply(config, place)
