"""What every experiment has: all fields, with the defaults where the paper is silent.

`base` returns a complete config; a stage file then sets what makes the experiment. Every value is
a field that the command line can override: --config.optimizer.lr=3e-4. Architectures are spelled
out from the presets, so that --config.model.mmdit.num_layers=8 works too.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

import qk_jax
from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.data import buckets, templates
from qk_jax.diffusion import flow
from qk_jax.experiment.stages import STAGES
from qk_jax.models import mmdit, qwen_vl, rotary, vae
from qk_jax.weights import hub_configs

ASSETS = Path(qk_jax.__file__).parent / "assets"

# The presets of each size. A 3b or 7b connector writes Qwen-Image's context width, so that one
# connector serves the stage-1 head and the generator after it.
PRESETS = {
    "tiny": {"vlm": "tiny", "head": "tiny_head", "mmdit": "tiny", "vae": "tiny"},
    "3b": {"vlm": "3b", "head": "0.9b", "mmdit": "10b", "vae": "qwen_image"},
    "7b": {"vlm": "7b", "head": "0.9b", "mmdit": "10b", "vae": "qwen_image"},
    "20b": {"vlm": "7b", "head": "0.9b", "mmdit": "20b", "vae": "qwen_image"},
}
SIZES = ("tiny", "tiny_long", "smoke", "3b", "7b", "20b")


def presets(size: str) -> str:
    """The key of PRESETS that a size uses.

    Raises:
      InputError: there is no such size.
    """
    if size not in SIZES:
        raise InputError(f"size {size!r} is unknown; give one of {', '.join(SIZES)}")
    return size if size in PRESETS else "tiny"


def pick(size: str, tiny: float, tiny_long: float, smoke: float, full: float) -> float:
    """The value for a size; `full` for all the big ones."""
    return {"tiny": tiny, "tiny_long": tiny_long, "smoke": smoke}.get(size, full)


def base(stage: str, size: str) -> ConfigDict:
    """A complete config of `stage` (of training.stages) at `size`; `steps` is still to be set.

    Raises:
      InputError: there is no such size.
    """
    names = PRESETS[presets(size)]
    tiny = presets(size) == "tiny"
    generator = mmdit.PRESETS[names["head" if stage == "stage1" else "mmdit"]]
    autoencoder = vae.PRESETS[names["vae"]]
    if tiny:  # the scale of its latents was measured, so it stands beside the weights
        autoencoder = hub_configs.from_hf("vae", read_json(ASSETS / "tiny/vae/config.json"))
    # The paper's reflection needs a generator that knows absolute positions; a constant offset is
    # learnt within minutes.
    law = rotary.PositionLaw(source_mode="translate" if tiny else "reflect")
    config = ConfigDict()
    config.stage = stage
    config.size = size
    config.seed = 0
    config.steps = 1

    config.model = ConfigDict({
        "vlm": dataclasses.asdict(qwen_vl.PRESETS[names["vlm"]]),
        "mmdit": dataclasses.asdict(generator),
        "vae": {"kind": vae.kind(autoencoder), **dataclasses.asdict(autoencoder)},
        "num_queries": 16 if tiny else 128,
        "max_text": 48 if tiny else 384,  # with the kontext 512: whole blocks of attention
        "tail_tokens": 5,
        "vlm_pixels": 112 * 112 if tiny else 448 * 448,
        "query_std": 0.02,
        "law": dataclasses.asdict(law),
        "condition_latents": False,
        "remat": "" if tiny else "full",  # '' keeps all activations; layers.remat_policy
    })  # fmt: skip

    # What the VLM reads around instruction and pictures: one of templates.PRESETS
    # (--config.prompt=qwen_image), each part of which is a field.
    config.prompt = ConfigDict(dataclasses.asdict(templates.PRESETS["query_kontext"]))

    # Parameters: what is trained (first regex that matches), and where parts come from.
    config.rules = STAGES[stage].rules
    config.lora = ConfigDict({"pattern": "", "rank": 0, "alpha": 0.0})  # models/lora.py
    config.init = ConfigDict({
        # folders of transformers and diffusers or Hub ids (owner/name[@revision]); '' starts fresh
        "vlm": str(ASSETS / "tiny/vlm") if tiny else "",
        "vae": str(ASSETS / "tiny/vae") if tiny else "",
        "mmdit": "",
        "lora": "",  # an adapter of the generator for stage 3
        "checkpoint": "",  # folder of the stage before; '' is <workdir>/<stage before>
        "ema": False,  # take the moving average of the stage before
    })  # fmt: skip

    config.optimizer = ConfigDict({
        "lr": 1e-4,
        "schedule": "cosine",  # or 'constant'
        "lr_end": 0.1,  # last rate of the cosine, as a part of lr
        "warmup": 1000,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip": 1.0,  # global norm; 0 is off
        "accumulation": 1,  # micro-batches per step
        "ema": 0.9999,  # 0 is off
        "offload": False,  # keep moments and average in the host's memory between updates
        # factors of the decay and of the rate by parameter name; the first regex that matches
        "decay": ((r".*/(kernel|lora_a|lora_b)", 1.0), (r".*", 0.0)),
        "rates": ((r".*", 1.0),),
    })  # fmt: skip
    config.time = ConfigDict(dataclasses.asdict(flow.TimeLaw()))
    config.alignment = ConfigDict({"weight": 0.0})

    config.data = ConfigDict({
        "corpus": "",  # folder of cut-outs from which the tasks are made; '' is the embedded one
        "records": "",  # instead: a folder of ready examples, or tfds:NAME
        "tfds_image": "image", "tfds_text": "text",  # features of tfds:NAME
        "tokenizer": str(ASSETS / "tiny/tokenizer") if tiny else "",  # '' is the VLM's folder
        "batch": 32,
        "tasks": {
            "text_to_image": 0.0, "reconstruction": 0.0, "transformation": 0.0,
            "editing": 0.0, "customization": 0.0, "composition": 0.0,
        },
        # target sizes (height, width); a picture goes to the one nearest in aspect ratio
        "sizes": ((64, 64), (48, 80), (80, 48)) if tiny else buckets.table(512, 16),
        "reference_size": 64 if tiny else 512,
        # text tokens of a row by its number of condition pictures, the last for more; longer
        # instructions are cut. () is model.max_text for all
        "text_tokens": (24, 32, 40) if tiny else (),
        # A dropped picture leaves a row without an answer: short runs can afford few of them.
        "dropout": {
            "text": 0.05 if tiny else 0.1,
            "pictures": 0.02 if tiny else 0.1,
            "both": 0.05 if tiny else 0.1,
        },
        # shapes of one task (each is compiled); rarer ones are merged into the nearest
        "max_groups": pick(size, tiny=2, tiny_long=4, smoke=1, full=8),
        "max_pixels": 64_000_000,  # a larger picture is a bad record
        "max_bad_share": 0.01,  # of the records read; above it the run stops
        "workers": 0 if tiny else 8,
        "threads": 2 if tiny else 16,
        "prefetch": 4 if tiny else 8,
    })  # fmt: skip

    config.dtype = ConfigDict({
        "compute": "float32" if tiny else "bfloat16",
        "frozen": "float32" if tiny else "bfloat16",
        "gradients": "float32",  # when devices sum them; or as compute (step.gatherer)
    })  # fmt: skip
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
    config.slices = ConfigDict({"data": 1, "fsdp": 1})  # the part of the mesh that spans slices
    # How each tower lies over the mesh: one of sharding.ROWS (--config.sharding.mmdit=zero2), each
    # cell of which is a field (--config.sharding.mmdit.params.embed=fsdp)
    config.sharding = ConfigDict({
        tower: dataclasses.asdict(sharding.row("fsdp"))
        for _, tower in sharding.TOWERS
    })  # fmt: skip
    config.sharding_limit = 0.02  # largest share of shardable parameter bytes left replicated

    # Compiled programs are kept in <workdir>/compilation_cache, or in JAX_COMPILATION_CACHE_DIR.
    config.compilation_cache = True
    # Options of the compiler by platform, 'name=value'. On a CPU the older emitter at level 1 makes
    # programs that are as fast in a quarter of the time.
    config.compiler = ConfigDict({
        "cpu": ("xla_cpu_use_fusion_emitters=false", "xla_backend_optimization_level=1"),
        "gpu": (), "tpu": (),
        "tpu_step": (),  # besides, for the train step alone, which has no convolutions
    })  # fmt: skip

    config.checkpoint = ConfigDict({
        "every": pick(size, 50, 500, 3, 1000),
        "keep": 2,
        "keep_every": 0,  # steps divisible by it stay for good; 0 for none
    })  # fmt: skip
    # Evaluation during training: `type` is one of training.evals.EVALUATORS, `every` 0 is off
    config.evals = ConfigDict({
        "loss": {"type": "loss", "every": pick(size, 0, 1000, 6, 2000)},
        # sheets of painted pictures of so many validation records per task
        "sheets": {
            "type": "sheets", "every": 0, "records": 4,
            "steps": 20, "guidance": 4.0, "image_guidance": 1.5, "seed": 0,
        },
    })  # fmt: skip
    config.validation = ConfigDict({  # the fixed held-out batches
        "batches": pick(size, 4, 4, 1, 4),
        "batch": pick(size, 32, 32, 8, 32), "seed": 17,
    })  # fmt: skip
    config.log = ConfigDict({"every": pick(size, 10, 50, 2, 50), "t_bins": 5})
    config.wandb = ConfigDict({"project": "", "name": ""})
    return config
