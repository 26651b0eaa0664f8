"""What every experiment has: all fields, with the defaults where the paper is silent.

`base` returns a complete config; a stage file then sets what makes the experiment. Every value is
a field that the command line can override: --config.optimizer.lr=3e-4. Architectures are spelled
out from the presets, so that --config.model.mmdit.num_layers=8 works too. What each field means is
in `qk_jax/experiment/glossary.py`, which --help prints; comments here say why a value is what it
is.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

import qk_jax
from qk_jax import sharding
from qk_jax.base import runtime
from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.data import buckets, templates
from qk_jax.data.example import TASKS
from qk_jax.diffusion import flow
from qk_jax.experiment import origins
from qk_jax.experiment.stages import STAGES
from qk_jax.models import mmdit, qwen_vl, rotary, vae
from qk_jax.pictures.decoding import MAX_PIXELS
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
    reader = qwen_vl.PRESETS[names["vlm"]]
    generator = mmdit.PRESETS[names["head" if stage == "stage1" else "mmdit"]]
    autoencoder = vae.PRESETS[names["vae"]]
    if tiny:  # the scale of its latents was measured, so it stands beside the weights
        autoencoder = hub_configs.from_hf("vae", read_json(ASSETS / "tiny/vae/config.json"))
    # Ours, by measurement (docs/figures.md, "Position laws"): a generator that never saw pictures
    # in context learns soonest to copy from a source that lies at its own place on another frame,
    # and public Qwen-Image weights know it there. The paper's law: model.law.kind=shifted,
    # model.law.source_mode=reflect. The tiny generator was pretrained with a constant offset.
    law = rotary.PositionLaw("shifted", "translate") if tiny else rotary.PositionLaw("qwen_image")
    config = ConfigDict()
    config.stage = stage
    config.size = size
    config.seed = 0
    config.steps = 1

    config.model = ConfigDict({
        "vlm": dataclasses.asdict(reader),
        "mmdit": dataclasses.asdict(generator),
        "vae": {"kind": vae.kind(autoencoder), **dataclasses.asdict(autoencoder)},
        "num_queries": 16 if tiny else 128,
        "max_text": 48 if tiny else 384,  # with the kontext 512: whole blocks of attention
        "tail_tokens": 5,
        "vlm_pixels": 112 * 112 if tiny else 448 * 448,
        "query_std": 0.02,
        "query_noise": 0.0,
        "bidirectional_queries": False,
        "vlm_layers": (),
        "law": dataclasses.asdict(law),
        "condition_latents": False,
        "remat": "" if tiny else "full",
    })  # fmt: skip

    # One of templates.PRESETS (--config.prompt=qwen_image), each part of which is a field.
    config.prompt = ConfigDict(dataclasses.asdict(templates.PRESETS["query_kontext"]))

    # Parameters: what is trained, and where parts come from. Of what the stage starts from
    # pretrained, the public weights; the paper's generator of 10 B is not public.
    config.rules, origin = STAGES[stage].rules, STAGES[stage].parts
    config.lora = ConfigDict({"pattern": "", "rank": 0, "alpha": 0.0})
    public = {"vlm": reader, "vae": vae.PRESETS[names["vae"]], "mmdit": generator}
    config.init = ConfigDict({
        **{
            part: origins.PUBLIC.get(preset, "") if origin[part] == "pretrained" else ""
            for part, preset in public.items()
        },
        "lora": "",
        "checkpoint": "",
        # What was validated and would be exported is what goes on. At the tiny size, where both
        # were tried, it makes no difference beyond its error (docs/figures.md).
        "ema": True,
        "unfinished": False,
    })  # fmt: skip

    config.optimizer = ConfigDict({
        "lr": 1e-4,
        "schedule": "cosine",
        "lr_end": 0.1,
        "warmup": 1000,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip": 1.0,
        "max_skipped": 10,
        "accumulation": 1,
        "ema": 0.9999,
        "offload": False,
        "decay": ((r".*/(kernel|lora_a|lora_b)", 1.0), (r".*", 0.0)),
        "rates": ((r".*", 1.0),),
    })  # fmt: skip
    config.time = ConfigDict(dataclasses.asdict(flow.TimeLaw()))
    config.loss = ConfigDict({"region_weight": 0.0})
    config.alignment = ConfigDict({"weight": 0.0, "kind": "cosine", "temperature": 0.1})

    config.data = ConfigDict({
        "corpus": "",
        "records": "",
        "sources": (),
        "cache": "",
        "tfds_image": "image", "tfds_text": "text",
        "tokenizer": str(ASSETS / "tiny/tokenizer") if tiny else "",
        "batch": 32,
        "tokens": 0,
        "tasks": {
            "text_to_image": 0.0, "reconstruction": 0.0, "transformation": 0.0,
            "editing": 0.0, "customization": 0.0, "composition": 0.0,
        },
        "sizes": ("64x64", "80x48", "48x80") if tiny else buckets.names(512, 16),
        "curriculum": (),
        "reference_size": 64 if tiny else 512,
        "reference_sizes_by_number": (),
        "reference_ratios": () if tiny else ((1, 1), (2, 3)),
        "text_tokens": (24, 32, 40) if tiny else (),
        # A dropped picture leaves a row without an answer: short runs can afford few of them.
        "dropout": {
            "text": 0.05 if tiny else 0.1,
            "pictures": 0.02 if tiny else 0.1,
            "both": 0.05 if tiny else 0.1,
        },
        "task_dropout": dict.fromkeys(TASKS, ()),
        "mixed_batches": False,
        # at the full sizes thirteen targets, each with two numbers or shapes of condition pictures
        "max_groups": pick(size, tiny=2, tiny_long=4, smoke=1, full=26),
        "max_pixels": MAX_PIXELS,
        "max_bad_share": 0.01,
        "workers": 0 if tiny else 8,
        "threads": 2 if tiny else 16,
        "prefetch": 4 if tiny else 8,
    })  # fmt: skip

    config.dtype = ConfigDict({
        "compute": "float32" if tiny else "bfloat16",
        "frozen": "float32" if tiny else "bfloat16",
        "gradients": "float32",
    })  # fmt: skip
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})
    config.slices = ConfigDict({"data": 1, "fsdp": 1})
    # A row of sharding.ROWS for each tower (--config.sharding.mmdit=zero2), each cell of which is a
    # field (--config.sharding.mmdit.params.embed=fsdp).
    config.sharding = ConfigDict({
        tower: dataclasses.asdict(sharding.row("fsdp"))
        for _, tower in sharding.TOWERS
    })  # fmt: skip
    config.sharding_limit = 0.02
    # Hosts of a large slice may start half an hour apart.
    config.distributed = ConfigDict({"timeout_s": 1800})
    config.watchdog = ConfigDict({"floor_s": 600.0, "factor": 20.0, "first_s": 7200.0})

    config.compilation_cache = True
    # Compiling a step of the real sizes takes up to 10 GB; a stage has at most four, first of all.
    config.programs = ConfigDict({"at_once": 4, "folder": ""})
    config.compiler = ConfigDict({
        "cpu": runtime.CPU_OPTIONS,
        "gpu": (), "tpu": (),
        "tpu_step": (),
    })  # fmt: skip

    config.checkpoint = ConfigDict({
        "every": pick(size, 50, 500, 3, 1000),
        "minutes": 0.0,
        "keep": 2,
        "keep_every": 0,
        "max_failures": 3,
        "grace_s": 30.0,
    })  # fmt: skip
    # Off: the losses of one task scatter with t, and what is far out depends on the batch. Try 10
    # with a few hundred examples a batch.
    config.spike = ConfigDict({"zscore": 0.0, "window": 100, "max_rollbacks": 10})
    config.evals = ConfigDict({
        "loss": {"type": "loss", "every": pick(size, 75, 250, 6, 2000)},
        "sheets": {
            "type": "sheets", "every": pick(size, 75, 250, 6, 5000),
            "records": pick(size, 2, 4, 2, 4), "steps": pick(size, 10, 20, 4, 20),
            "guidance": 4.0, "image_guidance": 1.5, "seed": 0,
        },
    })  # fmt: skip
    config.validation = ConfigDict({
        "batches": pick(size, 4, 4, 1, 2),
        # At the small sizes that of the training, whose encoder it shares; 64 divides over as many
        # devices.
        "batch": pick(size, 16, 16, 8, 64),
        "max_groups": pick(size, 1, 1, 1, 26),  # a program costs the small sizes more than a loss
        "seed": 17,
    })  # fmt: skip
    config.log = ConfigDict({"every": pick(size, 10, 50, 2, 50), "t_bins": 5})
    config.profile = ConfigDict({"steps": ()})
    config.wandb = ConfigDict({"project": "", "name": ""})
    return config
