"""Stage 1: the VLM learns to write a kontext that a small generator can paint from.

    python -m qk_jax.train --config stage1:tiny --workdir runs/tiny   # or configs/stage1.py:tiny

trains queries, connector, a LoRA on the language model and a fresh diffusion head on text-to-image,
reconstruction and transformation; condition pictures reach the head through the kontext alone.
Sizes: tiny (the quickstart), tiny_long, smoke (a minute, shows that it runs), and 3b, 7b, 20b (the
paper's 72K steps at batch 512; 20b differs from 7b in its later stages). The big sizes start from
Qwen/Qwen2.5-VL-7B-Instruct (3b: Qwen/Qwen2.5-VL-3B-Instruct) and the autoencoder of
Qwen/Qwen-Image; --config.init.vlm and --config.init.vae name other folders or Hub ids.
"""

from configs import common, recipes
from qk_jax.models import lora


def get_config(size: str = "tiny"):
    """The config at `size`, or at 'SIZE@SLICE' with the recipe for a slice (recipes.py)."""
    size, place = recipes.split(size)
    config = common.base("stage1", size)
    tiny = common.presets(size) == "tiny"
    config.steps = common.pick(size, tiny=150, tiny_long=500, smoke=6, full=72_000)
    config.data.batch = common.pick(size, tiny=16, tiny_long=16, smoke=8, full=512)
    config.data.tasks.text_to_image = 0.4
    config.data.tasks.reconstruction = 0.3
    config.data.tasks.transformation = 0.3
    config.lora.pattern = lora.VLM_TARGETS
    config.lora.rank = 16 if tiny else 128
    config.lora.alpha = 16.0 if tiny else 128.0
    config.optimizer.lr = 1e-3 if tiny else 1e-4
    config.optimizer.warmup = common.pick(size, tiny=20, tiny_long=100, smoke=2, full=2000)
    config.optimizer.ema = 0.99 if tiny else 0.9999
    if config.model.vlm.text.hidden_size == config.model.mmdit.joint_attention_dim:
        # Such a connector starts as the identity, and a fresh head must not teach it away from
        # what the generator of stage 2 knows (docs/figures.md). The rate is ours, not the paper's.
        config.optimizer.rates = ((r"connector/.*", 0.1), (r".*", 1.0))
    return recipes.apply(config, place)
