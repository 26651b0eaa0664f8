"""Every stage with random towers small enough that a step compiles in seconds.

python -m qk_jax.train --config tests/training/nano.py:stage1 --workdir W
"""

from configs import common, highres, stage1, stage2, stage3

STAGES = {"stage1": stage1, "stage2": stage2, "stage3": stage3, "highres": highres}


def get_config(stage: str = "stage1"):
    """The config of a stage, shrunk from `smoke`; nothing is read from pretrained folders."""
    config = STAGES[stage].get_config("smoke")
    config.size = "nano"
    config.steps = 4
    model = config.model
    model.num_queries, model.max_text, model.vlm_pixels = 4, 8, 56 * 56
    config.data.text_tokens = ()
    model.vlm.text.update({
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64, "mrope_section": (2, 3, 3),
    })  # fmt: skip
    model.vlm.vision.update({
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
        "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": (1,),
    })  # fmt: skip
    model.mmdit.update({
        "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 1 if stage == "stage1" else 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
    })  # fmt: skip
    model.vae.update({"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4})
    config.data.tokenizer = str(common.ASSETS / "tiny/tokenizer")
    for part, origin in common.STAGES[stage].parts.items():
        if origin == "pretrained":
            config.init[part] = "fresh"
    if config.lora.rank:
        config.lora.rank, config.lora.alpha = 2, 4.0
    config.optimizer.lr, config.optimizer.warmup = 1e-2, 1
    config.data.batch, config.validation.batch, config.validation.batches = 8, 8, 1
    config.checkpoint.every, config.log.every = 2, 1
    config.evals.loss.every = config.evals.sheets.every = 0
    config.compiler.cpu = (
        "xla_backend_optimization_level=0", "xla_cpu_use_fusion_emitters=false",
    )  # fmt: skip
    config.mesh.fsdp = 1
    config.mesh.data = -1
    return config
