"""Stage 2: the kontext meets the large generator, which is trained in full.

    python -m qk_jax.train --config stage2:tiny --workdir runs/tiny   # or configs/stage2.py:tiny

starts from <workdir>/stage1: its LoRA is merged into the VLM, which is frozen from here on, and its
head is dropped for the pretrained MMDiT. Queries, connector and the whole MMDiT are trained on
text-to-image and reconstruction. 7b is the paper's (420K steps at batch 1024), whose generator of
10 B is not public: --config.init.mmdit names yours. 20b starts from Qwen/Qwen-Image, or from
the editing model with --config.init.mmdit=Qwen/Qwen-Image-Edit-2511
--config.model.mmdit.zero_cond_t=true; its position law is the paper's, so that text and kontext
move from Qwen-Image's diagonal to zero.
"""

from configs import common, recipes


def get_config(size: str = "tiny"):
    """The config at `size`, or at 'SIZE@SLICE' with the recipe for a slice (recipes.py)."""
    size, place = recipes.split(size)
    config = common.base("stage2", size)
    tiny = common.presets(size) == "tiny"
    config.steps = common.pick(size, tiny=150, tiny_long=500, smoke=6, full=420_000)
    config.data.batch = common.pick(size, tiny=16, tiny_long=16, smoke=8, full=1024)
    config.data.tasks.text_to_image = 0.7
    config.data.tasks.reconstruction = 0.3
    config.optimizer.lr = 3e-4 if tiny else 5e-5
    config.optimizer.warmup = common.pick(size, tiny=20, tiny_long=100, smoke=2, full=2000)
    config.optimizer.ema = 0.99 if tiny else 0.9999
    return recipes.apply(config, place)
