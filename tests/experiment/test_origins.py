"""Where parts come from: nothing is random that was not asked for, and nobody asks the Hub."""

import huggingface_hub
import pytest

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench import __main__ as bench
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import origins, stages
from qk_jax.experiment.plan import Plan

QWEN = "Qwen/Qwen2.5-VL"
PUBLIC = {
    ("stage1", "3b"): {"vlm": f"{QWEN}-3B-Instruct", "vae": "Qwen/Qwen-Image"},
    ("stage1", "7b"): {"vlm": f"{QWEN}-7B-Instruct", "vae": "Qwen/Qwen-Image"},
    ("stage1", "20b"): {"vlm": f"{QWEN}-7B-Instruct", "vae": "Qwen/Qwen-Image"},
    ("stage2", "20b"): {"mmdit": "Qwen/Qwen-Image"},
    ("stage3", "20b"): {},
    ("highres", "7b"): {},
}


def places(stage, size, **init):
    overrides = {f"init.{name}": value for name, value in init.items()}
    config = config_lib.load(f"configs/{stage}.py:{size}", overrides)
    return origins.places(stages.resolve(config), config)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


@pytest.mark.parametrize(("stage", "size"), PUBLIC)
def test_the_real_sizes_start_from_public_weights(stage, size):
    assert places(stage, size) == PUBLIC[stage, size]


@pytest.mark.parametrize("size", ["tiny", "tiny_long", "smoke"])
def test_the_tiny_sizes_start_from_what_is_shipped(size):
    shipped = {part: str(origins.EMBEDDED / part) for part in ("vlm", "vae", "mmdit")}
    assert places("stage1", size) == {part: shipped[part] for part in ("vlm", "vae")}
    assert places("stage2", size) == {"mmdit": shipped["mmdit"]}


@pytest.mark.parametrize(
    "stage, size, part, right",
    [
        ("stage1", "7b", "vlm", f"give --config.init.vlm={QWEN}-7B-Instruct, another folder"),
        ("stage1", "3b", "vlm", f"give --config.init.vlm={QWEN}-3B-Instruct, another folder"),
        ("stage1", "7b", "vae", "give --config.init.vae=Qwen/Qwen-Image, another folder"),
        ("stage2", "20b", "mmdit", "give --config.init.mmdit=Qwen/Qwen-Image, another folder"),
        ("stage2", "7b", "mmdit", "give --config.init.mmdit=FOLDER_OR_HUB_ID"),
        ("stage1", "tiny", "vlm", "assets/tiny/vlm, another folder"),
    ],
)
@pytest.mark.parametrize("empty", ["", "  "])
def test_a_part_without_an_origin_is_refused_with_what_to_type(stage, size, part, right, empty):
    with pytest.raises(InputError) as error:
        places(stage, size, **{part: empty})
    message = str(error.value)
    assert f"starts from a pretrained {part}, and init.{part} is empty" in message
    assert right in message and f"--config.init.{part}=fresh" in message and "\n" not in message


def test_the_generator_of_10b_is_not_public_and_20b_is_named():
    with pytest.raises(InputError, match="size 20b, which starts from Qwen/Qwen-Image"):
        places("stage2", "7b")


def test_editing_weights_are_named_for_their_architecture():
    spec, fields = "configs/stage2.py:20b", {"model.mmdit.zero_cond_t": "true", "init.mmdit": ""}
    config = config_lib.load(spec, fields)
    with pytest.raises(InputError, match="init.mmdit=Qwen/Qwen-Image-Edit-2511"):
        origins.places(stages.resolve(config), config)


def test_the_word_fresh_and_only_it_draws_at_random(tmp_path):
    assert places("stage2", "7b", mmdit="fresh") == {}
    assert places("stage1", "tiny", vlm="fresh").keys() == {"vae"}
    assert places("stage1", "tiny", vae=str(tmp_path))["vae"] == str(tmp_path)
    for wrong in ("Fresh", "none", "models/", "a b/c", "../up"):
        with pytest.raises(InputError, match="init.vae: .*, or fresh for random parameters"):
            places("stage1", "tiny", vae=wrong)


def test_a_fresh_vlm_needs_a_tokenizer():
    with pytest.raises(InputError, match=f"--config.data.tokenizer={QWEN}-7B-Instruct"):
        places("stage1", "7b", vlm="fresh")


@pytest.mark.parametrize(
    "stage, field, words",
    [
        ("stage1", "mmdit", "stage1 does not take: its mmdit is fresh"),
        ("stage3", "mmdit", "stage3 does not take: its mmdit is that of stage2"),
        ("stage2", "lora", "its lora/mmdit is absent"),
        ("highres", "lora", "its lora/mmdit is that of stage3"),
        ("stage1", "checkpoint", "it is the first stage"),
    ],
)
def test_an_origin_that_the_stage_does_not_take_is_refused(stage, field, words):
    with pytest.raises(InputError, match=words):
        places(stage, "tiny", **{field: "owner/name"})


def test_what_loads_no_weights_asks_for_none(capsys):
    """Plans and the bench serve a config whose parts have no origin."""
    config = config_lib.load("configs/stage1.py:7b", {"init.vlm": "", "init.vae": ""})
    assert Plan.build(config, sharding.abstract_mesh({"fsdp": 64})).params
    empty = ["--config.init.mmdit=", "--config.model.mmdit.num_layers=2"]
    bench.main(["cost", "--config", "configs/stage2.py:7b", "--pictures", "0", *empty])
    assert "mmdit" in capsys.readouterr().out
