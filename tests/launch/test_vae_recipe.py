"""The recipe of the tiny autoencoder: its pictures, its loss, and one step of each form."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from test_vlm_recipe import recipe

vae = recipe("pretrain_vae")


@pytest.fixture(scope="module")
def cuts():
    return vae.cut_outs(vae.ASSETS / "corpus" / "validation.array_record")[:8]


def test_scenes_have_the_bucket_size_and_depend_on_the_seed_alone(cuts):
    for bucket in vae.BUCKETS:
        batch = vae.scenes(np.random.default_rng(1), cuts, bucket, 20)
        assert batch.shape == (20, *bucket, 3) and batch.dtype == np.uint8
        np.testing.assert_array_equal(batch, vae.scenes(np.random.default_rng(1), cuts, bucket, 20))
        assert batch.std((1, 2, 3)).min() > 0  # a subject is to be seen in every one
        corners = {tuple(picture[0, 0]) for picture in batch}
        assert len(corners) > 3  # not all on white


def test_edges_that_differ_cost_and_brightness_alone_does_not():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    assert float(vae.edge_loss(x, x + 0.3)) < 1e-6
    assert float(vae.edge_loss(x, x[:, :, ::-1])) > 0.1


def test_psnr_of_a_known_error():
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert vae.psnr(black, black + 51)[0] == pytest.approx(20 * np.log10(5))


def test_both_forms_write_a_folder(tmp_path, monkeypatch, cuts):
    shallow = dataclasses.replace(
        vae.CONFIG, block_out_channels=(8, 8), latent_channels=4, mid_block_add_attention=False
    )
    monkeypatch.setattr(vae, "CONFIG", shallow)
    monkeypatch.setattr(vae, "MODEL", vae.vae.VAE(shallow))
    monkeypatch.setattr(vae, "BUCKETS", {(16, 16): 1.0})
    monkeypatch.setattr(vae, "cut_outs", lambda path: cuts[:2])

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["x", "--steps", "2", "--batch", "2", *arguments])
        vae.main()

    run("--out", str(tmp_path / "first"), "--checkpoint", str(tmp_path / "state"))
    second = ("--decoder-of", str(tmp_path / "first"), "--out", str(tmp_path / "second"))
    run(*second)
    first, second = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    kept = {name for name in first if np.array_equal(first[name], second[name])}
    assert {name for name in first if name.startswith("encoder.")} <= kept < set(first)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("first", "second")]
    assert configs[0] == configs[1]
    report = json.loads((tmp_path / "second" / "metrics.json").read_text())
    assert report["steps"] == 4 and report["steps_of_the_decoder_alone"] == 2
    assert Image.open(tmp_path / "second" / "held_out.png").width == 16 * 80
    with pytest.raises(SystemExit) as stopped:
        run("--out", str(tmp_path / "second"))
    assert stopped.value.code == 2
    assert not list(tmp_path.glob(".*"))
