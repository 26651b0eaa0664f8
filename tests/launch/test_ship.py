"""The recipe of the shipped stage 3, run with a nano model."""

import json
import os
import shutil
import subprocess

import jax
import numpy as np
import painters
import pytest
import ship

from qk_jax import evaluation, painting
from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.checkpoints import run_folder
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import origins
from qk_jax.experiment.plan import Plan
from qk_jax.export.folder import export_pipeline
from qk_jax.models import lora
from qk_jax.weights.write import export_model

FAST = painting.Settings(steps=2, guidance=1.0, image_guidance=1.0)
EXTENT = evaluation.Extent(
    records=4, batch=4, times=(0.5,), captions=4, sheet=2, words=FAST, pictures=FAST
)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A stage-3 folder of a nano model, beside what it was trained with."""
    folder = painters.save(tmp_path / "run")
    painters.save(tmp_path / "run", "stage1")
    for stage in ("stage1", "stage2", "stage3"):
        config = config_lib.to_dict(painters.config(stage))
        files.write_json(files.Path(tmp_path / "run" / stage / run_folder.CONFIG), config)
    export_pipeline(painters.loaded("stage3"), tmp_path / "tiny")  # its autoencoder and tokenizer
    first, config = painters.loaded("stage1"), painters.plan().model.config
    adapter = lora.scaled(first.params["lora"]["vlm"], -first.plan.model.config.lora_scale)
    before = lora.merge(painters.params()["vlm"], adapter, 1.0)  # what stage 1 went on from
    export_model(before, config.vlm, tmp_path / "tiny" / "vlm")
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
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3),
        painter.params["vlm"], painters.params()["vlm"],
    )  # fmt: skip
    cases = evaluation.held_out_cases(painters.config(), EXTENT.records)["editing"]
    again = evaluation.Evaluator(painter, EXTENT)
    assert again.fidelity(cases, again.paint(cases))["psnr"] == figures["tasks"]["editing"]["psnr"]
    for kind, of in figures["tasks"]["editing"]["kinds"].items():
        assert f"| editing: {kind} | {of['psnr']:.2f} ± " in card
    assert "| stage1 | " in card and "{" not in card
    assert len(list((tmp_path / "s").glob("*.png"))) == 6


def test_stages_that_do_not_belong_together_are_not_shipped(trained, tmp_path):
    shutil.rmtree(trained.parent / "stage1")
    painters.save(trained.parent, "stage1", scale=2.0)
    with pytest.raises(InputError, match="stage1 is not what"):
        ship.main.__wrapped__(["--checkpoint", str(trained), "--out", str(tmp_path / "shipped")])


def test_the_three_stages_are_configs_that_fit(tmp_path):
    """stages.sh with an interpreter that only keeps what it is called with."""
    log, fake = tmp_path / "log", tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {log}\n')
    fake.chmod(0o755)
    script = files.Path(ship.__file__).parent / "stages.sh"
    command = ["bash", str(script), str(tmp_path), "--config.seed=5"]
    subprocess.run(command, env=os.environ | {"PYTHON": str(fake)}, check=True)
    plans = []
    for line in log.read_text().splitlines():
        _, _, _, spec, _, workdir, *given = line.split()
        assert workdir == str(tmp_path)
        pairs = (option.removeprefix("--config.").split("=", 1) for option in given)
        plans.append(Plan.build(config_lib.load(spec, dict(pairs))))
    assert [plan.stage.name for plan in plans] == ["stage1", "stage2", "stage3"]
    assert all(plan.config.seed == 5 for plan in plans)
    small = json.loads((script.parent / "small/config.json").read_text())
    assert {plan.model.config.mmdit.num_layers for plan in plans[1:]} == {small["num_layers"]}
    assert abs(sum(plans[2].config.data.tasks.values()) - 1) < 1e-6
