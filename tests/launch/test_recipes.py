"""The recipes of the shipped tiny weights, each run once from end to end with the least budget."""

import dataclasses
import io
import json
import tarfile

import build_corpus
import common
import mmdit_examples
import numpy as np
import pretrain_mmdit
import pretrain_vae
import pretrain_vlm
import pytest
import train_tokenizer
from PIL import Image
from safetensors.numpy import load_file

from qk_jax.base.errors import InputError
from qk_jax.data.prompts import load_tokenizer
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.weights.read import import_model


@pytest.fixture
def run(monkeypatch):
    """Calls a recipe's main with arguments."""

    def call(recipe, *arguments):
        monkeypatch.setattr("sys.argv", [recipe.__name__, *map(str, arguments)])
        recipe.main()

    return call


def written(folder, part):
    """(config, parameters, metrics, card) of a written folder."""
    config, params = import_model(part, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    return config, params, metrics, (folder / "README.md").read_text()


def test_vlm(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_vlm, "SLOTS", 4)
    run(pretrain_vlm, "--steps", 2, "--batch", 2, "--limit", 4, "--out", tmp_path)
    config, _, metrics, card = written(tmp_path, "vlm")
    assert config == pretrain_vlm.CONFIG
    assert metrics["training"]["steps"] == 2 and metrics["validation"]["candidates"] <= 4
    assert "4 captioned cut-outs" in card and "2 steps of 2 conversations" in card


def test_vae_and_its_decoder_alone(run, tmp_path, monkeypatch):
    shallow = dataclasses.replace(
        pretrain_vae.CONFIG,
        block_out_channels=(8, 8), latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    monkeypatch.setattr(pretrain_vae, "CONFIG", shallow)
    monkeypatch.setattr(pretrain_vae, "MODEL", pretrain_vae.vae.VAE(shallow))
    monkeypatch.setattr(pretrain_vae, "SIZES", ((16, 16),) * 3)
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--steps", 2, "--batch", 2, "--limit", 2, "--sheet", tmp_path / "sheet.png", "--out"]
    run(pretrain_vae, *options, first)
    run(pretrain_vae, *options, second, "--decoder-of", first)
    weights = [load_file(x / "diffusion_pytorch_model.safetensors") for x in (first, second)]
    kept = {name for name, x in weights[0].items() if np.array_equal(x, weights[1][name])}
    assert {name for name in weights[0] if name.startswith("encoder.")} <= kept < set(weights[0])
    (config, *_), (again, _, metrics, card) = (written(x, "vae") for x in (first, second))
    assert config == again and config.scaling_factor != 1
    assert metrics["steps"] == 4 and metrics["steps_of_the_decoder_alone"] == 2
    assert "4 steps of 2 pictures" in card
    assert Image.open(tmp_path / "sheet.png").width > 600


def test_mmdit_and_going_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mmdit_examples, "SLOTS", 4)
    for module in (mmdit_examples, pretrain_mmdit):  # programs are compiled for each size
        monkeypatch.setattr(module, "SIZES", ((64, 64),))
    monkeypatch.setattr(pretrain_mmdit, "STEPS", 2)
    options = ["--steps", 1, "--batch", 2, "--limit", 4, "--sheet", tmp_path / "sheet.png"]
    run(pretrain_mmdit, *options, "--shown", 0, "--out", tmp_path / "first")
    config, _, metrics, _ = written(tmp_path / "first", "mmdit")
    assert config == pretrain_mmdit.CONFIG and metrics["runs"][0]["tasks"] == ["text_to_image"]
    params, runs = pretrain_mmdit.go_on_from(tmp_path / "first")
    assert runs == metrics["runs"] and params.keys() == common.fresh(pretrain_mmdit.MODEL).keys()
    card = (tmp_path / "first" / "README.md").read_text()
    assert "4 of editing" in card and "1 in 0 minutes, 0% with a source: text_to_image" in card


def test_tokenizer(run, tmp_path):
    run(train_tokenizer, "--out", tmp_path)
    found, shipped = load_tokenizer(tmp_path), load_tokenizer(pretrain_vlm.TINY / "tokenizer")
    assert len(found) == len(shipped) == 2048
    assert found.chat_template == shipped.chat_template
    with pytest.raises(InputError, match="larger corpus"):
        train_tokenizer.train(iter(["a cat"]))


def tar(path, pictures):
    """Writes a tar with KEY.png beside KEY.json."""
    with tarfile.open(path, "w") as out:
        for key, (meta, rgba) in pictures.items():
            png = io.BytesIO()
            Image.fromarray(rgba).save(png, "PNG")
            for name, data in (
                (f"{key}.json", json.dumps(meta).encode()),
                (f"{key}.png", png.getvalue()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


def test_corpus(run, tmp_path):
    cutouts = list(Corpus("train"))[:40]
    rest = {"source": "here", "license": "free", "keywords": ["thing"]}
    emoji = {
        f"e{i}": (rest | {"caption": c.caption, "group": "Things", "skin_tones": []}, c.rgba)
        for i, c in enumerate(cutouts)
    }
    for i in range(40, 43):  # three tones of one base, of which one is kept
        cutout = Corpus("train")[i]
        caption = f"{cutout.caption}: tone {i}"
        meta = {"caption": caption, "group": "People", "skin_tones": [i], "base": "b"}
        emoji[f"e{i}"] = (rest | meta, cutout.rgba)
    clipart = {"c1": (rest | {"caption": "Zyxw qvut"}, cutouts[0].rgba)}  # no English phrase
    tar(tmp_path / "emoji.tar", emoji)
    tar(tmp_path / "clipart.tar", clipart)
    out = tmp_path / "corpus"
    options = ["--emoji", tmp_path / "emoji.tar", "--clipart", tmp_path / "clipart.tar"]
    run(build_corpus, *options, "--out", out)
    sides = {side: list(Corpus(side, out)) for side in ("train", "validation")}
    found = [cutout for side in sides.values() for cutout in side]
    assert 35 <= len(found) <= 41 and sum("with tone" in cutout.caption for cutout in found) == 1
    assert not {c.subject for c in sides["train"]} & {c.subject for c in sides["validation"]}
    assert f"| train | {len(sides['train'])} |" in (out / "README.md").read_text()


@pytest.mark.parametrize("recipe", [pretrain_mmdit, pretrain_vae, pretrain_vlm])
def test_a_wrong_number_is_refused_first(run, recipe, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(recipe, "--batch", 0)
    assert capsys.readouterr().err == "error: --batch is 0; give a positive number\n"
