"""The recipes of the shipped tiny weights, each run once from end to end with the least budget."""

import argparse
import dataclasses
import io
import json
import tarfile
import time

import build_corpus
import common
import jax
import jax.numpy as jnp
import mmdit_examples
import numpy as np
import pretrain_mmdit
import pretrain_vae
import pretrain_vlm
import pytest
import train_tokenizer
import vae_scenes
from PIL import Image
from safetensors.numpy import load_file

from qk_jax.base import runtime
from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.data.prompts import load_tokenizer
from qk_jax.data.synthesis.corpus import Corpus
from qk_jax.models import mmdit
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
    run(pretrain_vae, *options, tmp_path / "third", "--start", second)
    config, _, metrics, _ = written(tmp_path / "third", "vae")
    assert metrics["steps"] == 6 and config != again
    with pytest.raises(SystemExit, match="2"):
        run(pretrain_vae, *options, second, "--decoder-of", first, "--start", second)


def test_weights_are_measured_as_they_are(run, tmp_path, monkeypatch):
    """No minutes: the weights of a folder stay, and only its figures are made."""
    folder = pretrain_vae.common.TINY / "vae"
    config, _ = import_model("vae", folder)
    plain = dataclasses.replace(config, scaling_factor=1.0, shift_factor=0.0)
    monkeypatch.setattr(pretrain_vae, "CONFIG", plain)
    monkeypatch.setattr(pretrain_vae, "MODEL", pretrain_vae.vae.VAE(plain))
    options = ["--minutes", 0, "--limit", 2, "--sheet", tmp_path / "sheet.png"]
    run(pretrain_vae, *options, "--start", folder, "--out", tmp_path / "vae")
    again, _, metrics, _ = written(tmp_path / "vae", "vae")
    files = [x / "diffusion_pytorch_model.safetensors" for x in (folder, tmp_path / "vae")]
    weights = [load_file(file) for file in files]
    assert again == config and metrics["psnr_db"]["on_white_64x64"] > 20
    assert all(np.array_equal(x, weights[1][name]) for name, x in weights[0].items())


def test_scenes_are_cut_outs_as_pillow_draws_them():
    """A lone cut-out in its own size, and at other sizes as Pillow's bicubic filter gives it."""
    rgba = Corpus("train")[0].rgba
    height, width = rgba.shape[:2]
    pool = vae_scenes.pool([rgba])
    assert len(pool.rgba) == 1 + 42 and tuple(pool.box[0, 1]) == (height, width)
    top, left = pool.box[0, 0]
    assert np.array_equal(pool.rgba[0, top : top + height, left : left + width], rgba)
    keys = jax.random.split(jax.random.key(0), 200)
    own = jax.device_put(vae_scenes.Pool(pool.rgba[:1], pool.box[:1]))
    cell = jnp.array([[0.0, 0.0], [64.0, 64.0]])
    layers = np.asarray(jax.vmap(lambda key: vae_scenes.item(key, own, cell, True))(keys))
    assert layers.min() >= 0 and (layers[..., :3] <= layers[..., 3:] + 1e-6).all()
    scale = 64 / max(height, width)
    size = round(width * scale), round(height * scale)
    found = np.asarray(Image.fromarray(rgba).resize(size, Image.Resampling.BICUBIC), np.float32)
    truth = np.zeros((64, 64, 4), np.float32)
    top, left = (64 - size[1]) // 2, (64 - size[0]) // 2
    truth[top : top + size[1], left : left + size[0]] = found / 255
    truth[..., :3] *= truth[..., 3:]
    assert np.abs(layers - truth).mean((1, 2, 3)).min() < 0.01


def test_scenes_vary_and_fill_their_range():
    pool = vae_scenes.pool([cutout.rgba for cutout in list(Corpus("train"))[:20]])
    found = np.asarray(vae_scenes.scenes(jax.random.key(1), jax.device_put(pool), 64))
    assert found.shape == (64, 64, 64, 3) and found.dtype == np.uint8
    white = (found == 255).all(-1).mean((1, 2))
    assert 0.2 < (white > 0.2).mean() < 0.8  # half of the grounds are white
    assert len(np.unique(found.mean((1, 2, 3)))) == 64


def test_the_vlm_reads_pictures_as_prompts_gives_them():
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    ours = mmdit_examples.patches(mmdit_examples.as_seen(picture)[None])[0]
    np.testing.assert_allclose(
        ours, prompts.pixel_values([picture], mmdit_examples.VLM_PIXELS), atol=1e-6
    )


def test_steps_fill_their_budget(monkeypatch):
    """As many at once as fit in the time, never more than are left; the clock of the program."""
    args = argparse.Namespace(steps=100, minutes=1.0)
    taken = [(first, count) for first, count, _ in common.steps(args, at_once=3600)]
    assert taken[:4] == [(0, 1), (1, 4), (5, 16), (21, 64)] and sum(n for _, n in taken) == 100
    assert [count for _, count, _ in common.steps(args)] == [1] * 100
    monkeypatch.setattr(common, "STARTED", time.monotonic() - 59.9)
    args.steps, parts = None, []
    for _, _, done in common.steps(args):
        parts.append(done)
        time.sleep(0.03)
    assert 2 <= len(parts) <= 4 and parts == sorted(parts) and parts[-1] < 1
    assert not list(common.steps(argparse.Namespace(steps=None, minutes=0.0)))


def test_batches_take_their_tasks_by_share():
    tasks = {
        "first": np.array([0, 10, 14], np.int32),
        "count": np.array([10, 4, 100], np.int32),
        "share": np.array([0.5, 0.0, 0.5], np.float32),
    }
    chosen = np.asarray(pretrain_mmdit.draw(jax.random.key(0), tasks, 2000))
    assert 900 < (chosen < 10).sum() < 1100 and (chosen >= 14).sum() == (chosen >= 10).sum()
    assert set(range(10)) <= set(chosen.tolist()) and chosen.max() < 114


def test_mmdit_and_going_on(run, tmp_path, monkeypatch):
    for module in (mmdit_examples, pretrain_mmdit):
        monkeypatch.setattr(module, "SLOTS", 4)
    monkeypatch.setattr(pretrain_mmdit, "STEPS", 2)
    run(mmdit_examples, "--limit", 4, "--processes", 2, "--out", tmp_path / "examples")
    options = ["--steps", 2, "--batch", 2, "--limit", 4, "--sheet", tmp_path / "sheet.png"]
    options += ["--examples", tmp_path / "examples", "--out"]
    run(pretrain_mmdit, *options, tmp_path / "first", "--shown", 0)
    config, first, metrics, card = written(tmp_path / "first", "mmdit")
    assert config == mmdit.PRESETS["tiny"] and metrics["runs"][0]["tasks"] == ["text_to_image"]
    assert "4 of editing" in card and "2 in 0 minutes, 0% with a source: text_to_image" in card
    run(pretrain_mmdit, *options, tmp_path / "second", "--start", tmp_path / "first")
    _, second, again, _ = written(tmp_path / "second", "mmdit")
    assert again["runs"][0] == metrics["runs"][0] and len(again["runs"]) == 2
    assert not np.array_equal(first["img_in"]["kernel"], second["img_in"]["kernel"])
    assert set(again["runs"][1]["tasks"]) == {"text_to_image", *mmdit_examples.PICTURES}
    with pytest.raises(InputError, match="another origin"):
        mmdit_examples.load(tmp_path / "examples", 5)


def test_a_time_that_is_over_before_the_first_step_leaves_whole_metrics(tmp_path):
    options = common.parser("mmdit", None, minutes=0, batch=2)
    args = options.parse_args(["--out", str(tmp_path)])
    args.preset, args.start, args.shown = "tiny", None, 0.75
    made = pretrain_mmdit.Run(args)
    counts = dict.fromkeys(("text_to_image", *mmdit_examples.PICTURES), 4)
    made.save(common.Progress(made.params, 0, 0, {}), counts)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["runs"][0]["steps"] == 0 and metrics["pictures"]["editing"] == 4


def test_a_source_that_is_not_shown_changes_nothing():
    """Text-to-image slots carry zeros as their source; no token may attend them."""
    generator = pretrain_mmdit.Generator(mmdit.PRESETS["tiny"])
    rng = np.random.default_rng(0)
    params = common.fresh(generator.model)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)
    latents = rng.normal(size=(3, 2, 16, 64)).astype(np.float32)
    batch = {
        "size": np.zeros(2, np.int32), "shown": np.array([False, True]), "source": latents[1],
        "text": rng.normal(size=(2, 8, 192)).astype(np.float16), "mask": np.ones((2, 8), bool),
    }  # fmt: skip
    params, latents, batch = jax.device_put((params, latents, batch))
    found = [
        np.asarray(generator.velocity(params, latents[0], jnp.full(2, 0.5), given))
        for given in (batch, batch | {"source": latents[2]})
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    assert np.abs(found[0][1] - found[1][1]).max() > 1e-3


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


@pytest.mark.parametrize("recipe", [mmdit_examples, pretrain_mmdit, pretrain_vae, pretrain_vlm])
def test_no_recipe_looks_for_a_tpu_that_is_not_there(run, recipe, monkeypatch):
    """It is told so before anything is computed; `--batch 0` ends those that train."""
    events = []
    monkeypatch.setattr(runtime, "skip_absent_tpu", lambda: events.append("skip"))
    monkeypatch.setattr(mmdit_examples, "make", lambda *_: events.append("make"))
    if recipe is mmdit_examples:
        run(recipe)
    else:
        with pytest.raises(SystemExit):
            run(recipe, "--batch", 0)
    assert events[0] == "skip" and len(events) <= 2
