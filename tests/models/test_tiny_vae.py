"""The autoencoder that ships with the package: it loads in diffusers and keeps new pictures."""

import io
import json
import pathlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image, ImageOps

from qk_jax.data import records
from qk_jax.models import vae
from qk_jax.weights.read import import_model

ASSETS = pathlib.Path(vae.__file__).parents[1] / "assets"
FOLDER = ASSETS / "tiny" / "vae"


def held_out(count):
    """The first cut-outs of the validation side on white, float32 [count, 64, 64, 3]."""
    file = records.RecordFile(ASSETS / "corpus" / "validation.array_record")
    pictures = []
    for number in range(count):
        (blob,) = file[number].blobs.values()
        cut = ImageOps.contain(Image.open(io.BytesIO(blob)).convert("RGBA"), (64, 64))
        canvas = Image.new("RGBA", (64, 64), "white")
        canvas.alpha_composite(cut, ((64 - cut.width) // 2, (64 - cut.height) // 2))
        pictures.append(np.asarray(canvas.convert("RGB")))
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def test_keeps_held_out_pictures_and_equals_diffusers():
    config, params = import_model("vae", FOLDER, jnp.float32)
    model = vae.VAE(config)
    x = held_out(16)
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode")[0])
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    z = encode(x)
    y = decode(z)
    theirs = diffusers.AutoencoderKL.from_pretrained(FOLDER, torch_dtype=torch.float32)
    with torch.no_grad():
        z_torch = theirs.encode(torch.from_numpy(x.transpose(0, 3, 1, 2))).latent_dist.mode()
        y_torch = theirs.decode(z_torch).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(z, z_torch.numpy().transpose(0, 2, 3, 1), atol=2e-4)
    np.testing.assert_allclose(y, y_torch, atol=2e-4)
    error = np.square(x - np.clip(y, -1, 1)).mean((1, 2, 3))
    assert np.mean(10 * np.log10(4 / error)) > 27
    normal = np.asarray(vae.normalize(z, config))
    assert abs(normal.mean()) < 0.3 and 0.7 < normal.std() < 1.4


def test_the_folder_is_small_and_says_how_it_was_made():
    assert (FOLDER / "diffusion_pytorch_model.safetensors").stat().st_size < 8_000_000
    figures = json.loads((FOLDER / "metrics.json").read_text())
    assert set(figures) >= {"steps", "psnr_db", "latent_channels", "parameters"}
    assert "PSNR" in (FOLDER / "README.md").read_text()
