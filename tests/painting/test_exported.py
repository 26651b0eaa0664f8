"""An export painted with: the same model as the folder of the stage, or one line of error."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from qk_jax import painting
from qk_jax.base import files, runtime
from qk_jax.base.errors import InputError
from qk_jax.export.folder import export_pipeline
from qk_jax.models import lora
from qk_jax.painting import exported
from qk_jax.weights.write import export_lora
from tests.export import models
from tests.painting import painters

FAST = painting.Settings(steps=2)
KINDS = {
    "as trained": {},
    "Qwen-Image's": {
        "law": dataclasses.replace(models.SHIFTED, kind="qwen_image"),
        "vae_kind": "qwen_vae",
        "prompt": "qwen_image_edit_plus",
    },
    "layers": {"switches": (("vlm_layers", (1,)), ("bidirectional_queries", True))},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_pipeline(models.loaded(), folder)
    return folder


def requests(painter):
    source, subject = (painters.picture(seed, 64, 64) for seed in (1, 2))
    return [painter.fit("make it blue", source), painter.fit("a cup", references=[subject])]


def weights(painter):
    return jax.tree.map(np.asarray, painter.params)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_the_model_again(kind, tmp_path):
    """In float32: equal configs, limits and weights, so that the programs are the same."""
    ours = models.painter(**KINDS[kind])
    export_pipeline(models.loaded(**KINDS[kind]), tmp_path / "model")
    back = painting.load(tmp_path / "model", batch=1)
    assert back.config == ours.config
    assert (back.limits, back.schedule) == (ours.limits, ours.schedule)
    assert back.prompts.template == ours.prompts.template
    jax.tree.map(np.testing.assert_array_equal, weights(back), weights(ours))


def test_an_export_paints_the_same_bits(folder, monkeypatch):
    ours = models.painter()
    # The nano config has options of its own, by which the bits may differ.
    monkeypatch.setattr(runtime, "CPU_OPTIONS", models.loaded().plan.config.compiler.cpu)
    back = painting.load(folder, batch=1)
    assert back.programs.model.config == ours.config and back.name == "model"
    for one, other in zip(
        ours.paint(requests(ours), FAST), back.paint(requests(back), FAST), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_an_export_of_half_the_bits_is_painted_in_its_type(tmp_path):
    export_pipeline(models.loaded(), tmp_path / "brain", "bfloat16")
    export_pipeline(models.loaded(), tmp_path / "half", "float16")
    brain, half = (painting.load(tmp_path / name, batch=1) for name in ("brain", "half"))
    types = [np.dtype(painter.programs.model.dtype).name for painter in (brain, half)]
    assert types == ["bfloat16", "float32"]
    for one, other in zip(
        jax.tree.leaves(weights(half)), jax.tree.leaves(weights(models.painter())), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_a_separate_adapter_is_merged(tmp_path):
    found = painters.loaded("stage3")
    export_pipeline(found, tmp_path / "apart", lora="separate")
    back = painting.load(tmp_path / "apart", batch=1)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        weights(back), weights(painting.of_loaded(found, batch=1)),
    )  # fmt: skip


def test_an_adapter_in_place_of_the_text_encoder_is_merged(folder, tmp_path):
    """As in the shipped model, whose text encoder adapts the VLM that lies beside it."""
    base = models.loaded().params["vlm"]
    adapter = lora.init(jax.random.key(0), base, lora.VLM_TARGETS, 2)
    adapter = jax.tree.map(lambda leaf: leaf + 0.01, adapter)  # a fresh one changes nothing
    shutil.copytree(folder, tmp_path / "model")
    shutil.move(tmp_path / "model/text_encoder", tmp_path / "vlm")
    export_lora(adapter, 0.5, tmp_path / "model/text_encoder", tower="vlm")
    shared = {"text_encoder": files.Path(tmp_path / "vlm")}
    back = exported.load(files.Path(tmp_path / "model"), batch=1, shared=shared)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6),
        back.params["vlm"], lora.merge(base, adapter, 0.5),
    )  # fmt: skip


def _without(name):
    def break_(folder):
        shutil.rmtree(folder / name)

    return break_


def _changed(name, **values):
    def break_(folder):
        kept = files.read_json(folder / name) | values
        given = {key: value for key, value in kept.items() if value is not None}
        files.write_json(folder / name, given)

    return break_


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (_without("text_encoder"), "text_encoder"),
        (_without("kontext"), "kontext"),
        (_without("tokenizer"), "tokenizer.json"),
        (_changed("model_index.json", sizes=None), "KeyError: 'sizes'"),
        (_changed("model_index.json", law="round"), "round"),
        (_changed("model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
        (_changed("kontext/config.json", num_queries=5), "queries"),
        (_changed("scheduler/scheduler_config.json", base_shift=None), "base_shift"),
    ],
)
def test_a_broken_export_is_one_line(folder, tmp_path, break_, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    break_(copy)
    with pytest.raises(InputError, match=message) as error:
        painting.load(copy).paint([], FAST)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [{"step": 3}, {"ema": False}])
def test_an_export_has_one_set_of_weights(folder, asked):
    with pytest.raises(InputError, match="leave out --step and --no-ema"):
        painting.load(folder, **asked)


def test_a_model_describes_itself_before_it_is_read(folder, tmp_path):
    assert painting.described(folder) == (models.painter().limits, False)
    stage = painters.save(tmp_path / "one", average=True)
    assert painting.described(stage) == (painters.painter().limits, True)
    plain = painters.save(tmp_path / "other")
    assert painting.described(plain) == (painters.painter().limits, False)
    (plain / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
    with pytest.raises(InputError, match="step 4 is damaged: its metadata cannot be read"):
        painting.described(plain)
    with pytest.raises(InputError, match="holds no checkpoints"):
        painting.described(tmp_path)
