"""The recipe of the shipped stage 3, run with a nano model."""

import json

import painters
import pytest
import ship

from qk_jax import evaluation, painting
from qk_jax.base import files
from qk_jax.checkpoints import run_folder
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import origins
from qk_jax.export.folder import export_pipeline

FAST = painting.Settings(steps=2, guidance=1.0, image_guidance=1.0)
EXTENT = evaluation.Extent(
    records=4, batch=4, times=(0.5,), captions=4, sheet=2, words=FAST, pictures=FAST
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A stage-3 folder of a nano model, beside what it was trained with."""
    folder = painters.save(tmp_path / "run")
    for stage in ("stage1", "stage2", "stage3"):
        config = config_lib.to_dict(painters.config(stage))
        files.write_json(files.Path(tmp_path / "run" / stage / run_folder.CONFIG), config)
    export_pipeline(painters.loaded("stage3"), tmp_path / "tiny")  # its autoencoder and tokenizer
    monkeypatch.setattr(origins, "EMBEDDED", tmp_path / "tiny")
    monkeypatch.setattr(evaluation, "Extent", lambda records: EXTENT)
    return folder


def test_what_is_shipped_is_what_was_measured(trained, tmp_path):
    out = tmp_path / "shipped"
    ship.main(["--checkpoint", str(trained), "--out", str(out), "--sheets", str(tmp_path / "s")])
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "kontext", "metrics.json", "model_index.json", "scheduler", "text_encoder",
        "transformer",
    ]  # fmt: skip
    assert not list(out.rglob("*.py"))  # the parts that PyTorch would run are not shipped
    card, figures = (out / "README.md").read_text(), json.loads((out / "metrics.json").read_text())
    painter = painting.loading.load_shipped(out, batch=EXTENT.batch)
    cases = evaluation.held_out_cases(painters.config(), EXTENT.records)["editing"]
    again = evaluation.Evaluator(painter, EXTENT)
    assert again.fidelity(cases, again.paint(cases))["psnr"] == figures["tasks"]["editing"]["psnr"]
    for kind, of in figures["tasks"]["editing"]["kinds"].items():
        assert f"| editing: {kind} | {of['psnr']:.2f} ± " in card
    assert "| stage1 | " in card and "{" not in card
    assert len(list((tmp_path / "s").glob("*.png"))) == 6
