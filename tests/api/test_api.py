"""The Python API: equal to PyTorch, on one device and on eight; light; clear about wrong input."""

import dataclasses
import functools
import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import painters
import pytest
import torch
import transformers
from PIL import Image

import qk_jax
from qk_jax import sample, sharding
from qk_jax.api import published as published_lib
from qk_jax.api import trained
from qk_jax.base.errors import InputError
from qk_jax.models import mmdit
from qk_jax.weights import hub_configs
from tests.models import torch_copy
from tests.weights import nano

IMAGE, WORDS = nano.VLM.image_token_id, 49
GRIDS = ((8, 4), (4, 6), (4, 6))  # not the same backwards
CLEAN = dataclasses.replace(nano.MMDIT, zero_cond_t=True)
PICTURES = ((1, 4, 6), (1, 3, 5), (1, 2, 2))
PARTS = {
    "vlm": (transformers.Qwen2_5_VLForConditionalGeneration, nano.VLM, qk_jax.load_vlm),
    "mmdit": (diffusers.QwenImageTransformer2DModel, nano.MMDIT, qk_jax.load_mmdit),
    "clean": (diffusers.QwenImageTransformer2DModel, CLEAN, qk_jax.load_mmdit),
    "kl": (diffusers.AutoencoderKL, nano.KL, qk_jax.load_vae),
    "qwen_vae": (diffusers.AutoencoderKLQwenImage, nano.QWEN_VAE, qk_jax.load_vae),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> (PyTorch model with random weights, the folder that it wrote)."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def make(name):
        kind, config, _ = PARTS[name]
        torch.manual_seed(0)
        if name == "vlm":
            model = kind(transformers.Qwen2_5_VLConfig.from_dict(hub_configs.to_hf(config)))
        else:
            values = hub_configs.to_hf(config)
            model = kind(**{k: v for k, v in values.items() if not k.startswith("_")})
        model = torch_copy.randomize(model.float(), scale=0.2).eval()
        model.save_pretrained(folder / name)
        return model, folder / name

    return make


@pytest.fixture(scope="module")
def ours(published):
    """name, mesh -> our model of the folder."""
    return functools.cache(lambda name, mesh=None: PARTS[name][2](published(name)[1], mesh=mesh))


def meshes():
    """One device; eight in every role that parameters and batches know."""
    return [None, sharding.build_mesh({"data": 2, "fsdp": 2, "tensor": 2})]


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    worst = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert worst < tolerance, worst


@functools.cache
def sequences(padding, rows=2):
    """ids, mask, pixel_values and image_grid_thw; rows with two pictures, one, none and three."""
    rng = np.random.default_rng(0)
    lines, grids = [], []
    for row in range(rows):
        own = (GRIDS[:2], GRIDS[2:], (), GRIDS)[row]
        line = [rng.integers(3, WORDS, 3 + row)]
        for height, width in own:
            line += [np.full(height * width // 4, IMAGE), rng.integers(3, WORDS, 2)]
        lines.append(np.concatenate(line))
        grids += own
    ids = np.zeros((rows, max(map(len, lines))), np.int64)
    mask = np.zeros_like(ids)
    for row, line in enumerate(lines):
        at = slice(-len(line), None) if padding == "left" else slice(len(line))
        ids[row, at], mask[row, at] = line, 1
    pixels = rng.standard_normal((sum(h * w for h, w in grids), 1176)).astype(np.float32)
    return ids, mask, pixels, np.array([(1, *grid) for grid in grids])


def last_hidden_state(model, ids, mask, pixels=None, thw=None):
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if thw is not None:
        given |= {
            "pixel_values": torch.from_numpy(pixels),
            "image_grid_thw": torch.from_numpy(thw),
            "mm_token_type_ids": torch.from_numpy((ids == IMAGE).astype(np.int32)),
        }
    with torch.no_grad():
        return model.model(**given).last_hidden_state.numpy()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_vlm_equals_transformers(padding, published, ours):
    given = sequences(padding)
    theirs = last_hidden_state(published("vlm")[0], *given)
    states = ours("vlm")(*given)
    assert states.shape == theirs.shape and states.dtype == jnp.float32
    seen = given[1] > 0
    close(np.asarray(states)[seen], theirs[seen])
    named = ours("vlm")(**dict(zip(
        ("input_ids", "attention_mask", "pixel_values", "image_grid_thw"), map(jnp.asarray, given),
        strict=True,
    )))  # fmt: skip
    np.testing.assert_array_equal(named, states)


def test_vlm_without_pictures_and_without_padding(published, ours):
    ids = np.random.default_rng(1).integers(3, WORDS, (2, 7))
    theirs = last_hidden_state(published("vlm")[0], ids, np.ones_like(ids))
    close(ours("vlm")(ids), theirs)


def test_vlm_on_eight_devices(ours):
    given = sequences("left", 4)  # with four pictures of one grid, which are shared like the rows
    seen = given[1] > 0
    one, eight = (np.asarray(ours("vlm", mesh)(*given))[seen] for mesh in meshes())
    close(eight, one)


def tokens(config, rows=2, pictures=PICTURES):
    """hidden_states, encoder_hidden_states, mask, timestep and img_shapes as diffusers has them."""
    rng = np.random.default_rng(0)
    count = sum(h * w for _, h, w in pictures)
    hidden = rng.standard_normal((rows, count, config.in_channels)).astype(np.float32)
    context = rng.standard_normal((rows, 7, config.joint_attention_dim)).astype(np.float32)
    mask = np.arange(7) < np.array([7, 4] * rows)[:rows, None]
    time = np.linspace(0.0625, 0.021, rows).astype(np.float32)
    return hidden, context, mask.astype(np.int64), time, [list(pictures)] * rows


@pytest.mark.parametrize("name", ["mmdit", "clean"])
def test_mmdit_equals_diffusers(name, published, ours):
    *arrays, shapes = tokens(PARTS[name][1])
    with torch.no_grad():
        theirs = published(name)[0](*map(torch.from_numpy, arrays), shapes).sample.numpy()
    velocity = ours(name)(*arrays, shapes)
    assert velocity.shape == theirs.shape
    close(velocity, theirs)
    hidden, context, mask, time, _ = map(jnp.asarray, (*arrays, 0))
    same = ours(name)(
        hidden_states=hidden, encoder_hidden_states=context, encoder_hidden_states_mask=mask,
        timestep=time, img_shapes=PICTURES,
    )  # fmt: skip
    np.testing.assert_array_equal(same, velocity)


def test_mmdit_without_mask_at_one_time_and_its_gradient(ours):
    hidden, context, mask, _, shapes = tokens(nano.MMDIT)
    model = ours("mmdit")
    whole = model(hidden, context, np.ones_like(mask), np.full(2, 0.5), shapes)
    np.testing.assert_array_equal(model(hidden, context, None, 0.5, shapes), whole)
    slope = jax.grad(lambda x: jnp.sum(model(hidden, x, mask, 0.5, shapes)))(jnp.asarray(context))
    assert np.any(slope[1, :4]) and not np.any(slope[1, 4:])


@pytest.mark.parametrize("rows", [3, 4])  # of which the mesh divides the four
def test_mmdit_on_eight_devices(rows, ours):
    given = tokens(CLEAN, rows)
    one, eight = (ours("clean", mesh)(*given) for mesh in meshes())
    close(eight, one)


@pytest.mark.parametrize("name", ["vlm", "mmdit"])
def test_a_device_holds_its_share_only(name, ours):
    one, eight = (jax.tree.leaves(ours(name, mesh).params) for mesh in meshes())
    held = sum(leaf.addressable_shards[0].data.size for leaf in eight)
    assert held < 0.4 * sum(leaf.size for leaf in one)


def normalised(model, z):
    """As diffusers' pipelines normalise latents [B, C, h, w] -> [B, h, w, C]."""
    config, z = model.config, z.numpy().transpose(0, 2, 3, 1)
    if isinstance(model, diffusers.AutoencoderKLQwenImage):
        return (z - np.array(config.latents_mean)) / np.array(config.latents_std)
    return (z - config.shift_factor) * config.scaling_factor


@pytest.mark.parametrize("name", ["kl", "qwen_vae"])
def test_vae_equals_diffusers(name, published, ours):
    model, vae = published(name)[0], ours(name)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 16, 3)).astype(np.float32)
    frame = (slice(None), slice(None), 0) if name == "qwen_vae" else ()
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        posterior = model.encode(nchw[:, :, None] if frame else nchw).latent_dist
        picture = model.decode(posterior.mean).sample[frame].numpy().transpose(0, 2, 3, 1)
    z = vae.encode(x)
    assert z.shape == (2, 4, 2, 4) and z.dtype == jnp.float32
    close(z, normalised(model, posterior.mean[frame]))
    close(vae.decode(z), picture)
    noise = np.array(jax.random.normal(jax.random.key(5), z.shape).transpose(0, 3, 1, 2))
    noise = noise[:, :, None] if frame else noise
    drawn = (posterior.mean + posterior.std * torch.from_numpy(noise))[frame]
    close(vae.encode(x, rng=jax.random.key(5)), normalised(model, drawn))
    four = np.concatenate([x, -x])
    one, eight = (ours(name, mesh).encode(four) for mesh in meshes())
    close(eight, one)
    close(*(ours(name, mesh).decode(one) for mesh in meshes()))


def test_dtype_is_the_files_or_the_given(published, tmp_path):
    model, folder = published("kl")
    rough = qk_jax.load_vae(folder, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.params)} == {jnp.dtype(jnp.bfloat16)}
    nano.KINDS["kl"].write(rough.params, tmp_path)
    again = qk_jax.load_vae(tmp_path)
    assert again.dtype == jnp.bfloat16
    x = np.zeros((1, 16, 16, 3), np.float32)
    np.testing.assert_array_equal(again.encode(x), rough.encode(x))


def test_what_is_loaded_prints_as_one_line(ours, published):
    for name, mesh, words in (
        ("vlm", None, "LoadedVLM(Qwen2.5-VL of its own size, "),
        ("clean", None, "LoadedMMDiT(QwenImageTransformer2DModel of its own size, "),
        ("kl", None, "LoadedVAE(AutoencoderKL of its own size, "),
        ("vlm", meshes()[1], "LoadedVLM("),
    ):
        model = ours(name, mesh)
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        end = "1 device)" if mesh is None else "8 devices)"
        assert repr(model).startswith(words)
        assert repr(model).endswith(f", {count:,} parameters, float32, {end}")
    rough = qk_jax.load_vae(published("kl")[1], dtype="bfloat16")
    assert ", bfloat16, " in repr(rough)
    for size, config in mmdit.PRESETS.items():
        other = dataclasses.replace(config, zero_cond_t=not config.zero_cond_t)
        for one in (config, other):
            text = repr(published_lib.LoadedMMDiT(one, {}, np.dtype("float32")))
            assert text.startswith(f"LoadedMMDiT(QwenImageTransformer2DModel {size}, 0 param")


def test_a_shape_is_compiled_once(ours, published):
    given = tokens(nano.MMDIT)
    other = qk_jax.load_mmdit(published("mmdit")[1])
    ours("mmdit")(*given)
    before = published_lib._velocity._cache_size()
    other(*given)
    ours("mmdit")(given[0] + 1, *given[1:])
    assert published_lib._velocity._cache_size() == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return painters.save(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return qk_jax.load(checkpoint, batch=2)


def test_a_trained_model_prints_as_one_line(model):
    count = sum(leaf.size for leaf in jax.tree.leaves(model.painter.params))
    wanted = f"TrainedModel(stage3-nano-4, {count:,} parameters, float32, 1 device)"
    assert repr(model) == wanted


def test_generate_over_eight_devices_paints_the_same(checkpoint, model):
    mesh = sharding.build_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    eight = qk_jax.load(checkpoint, batch=2, mesh=mesh)
    words = {"source": painters.picture(0), "height": 32, "width": 32, "steps": 2}
    (ours,), (theirs,) = model.generate("a kite", **words), eight.generate("a kite", **words)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    held = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(eight.painter.params)}
    assert held == {8}


def test_generate_gives_the_bits_of_the_command(checkpoint, model, tmp_path):
    paths = [tmp_path / "source.png", tmp_path / "reference.png"]
    transparent = np.dstack([painters.picture(1), painters.picture(2)[..., :1]])
    Image.fromarray(painters.picture(0)).save(paths[0])
    Image.fromarray(transparent).save(paths[1])
    sample.main([
        "--checkpoint", str(checkpoint), "--prompt", "make it blue", "--source", str(paths[0]),
        "--reference", str(paths[1]), "--out", str(tmp_path / "x.png"), "--size", "48x32",
        "--num", "2", "--steps", "2", "--batch", "2", "--seed", "3", "--solver", "heun",
        "--image-guidance", "2",
    ])  # fmt: skip
    written = [np.asarray(Image.open(tmp_path / f"x-{n}.png")) for n in range(2)]
    told = []
    for source, reference in (paths, (painters.picture(0), Image.open(paths[1]))):
        painted = model.generate(
            "make it blue", source, [reference], height=32, width=48, steps=2, seed=3, num=2,
            solver="heun", image_guidance=2.0,
            progress=lambda *count: told.append(count),
        )  # fmt: skip
        assert [(picture.mode, picture.size) for picture in painted] == [("RGB", (48, 32))] * 2
        np.testing.assert_array_equal(list(map(np.asarray, painted)), written)
    assert told == [(0, 2), (1, 2), (2, 2)] * 2
    assert (written[0] != written[1]).any()
    rgba = np.asarray(Image.open(paths[1]))
    again = model.generate(
        "make it blue", painters.picture(0), [rgba], height=32, width=48, steps=2, seed=3, num=2,
        solver="heun", image_guidance=2.0,
    )  # fmt: skip
    np.testing.assert_array_equal(list(map(np.asarray, again)), written)
    natural = model.generate("a kite", steps=1, guidance=1.0)
    assert natural[0].size == model.painter.limits.sizes[0][::-1]


def test_loading_keeps_programs_and_paints_what_is_asked_for_at_once(checkpoint, monkeypatch):
    kept, slots = [], []
    monkeypatch.setattr(trained.runtime, "keep_programs", lambda: kept.append(True))
    free = qk_jax.load(checkpoint)
    denoise = free.painter.programs.denoise
    monkeypatch.setattr(
        free.painter.programs,
        "denoise",
        lambda *a, **k: (slots.append(len(a[1])), denoise(*a, **k))[1],
    )
    assert len(free.generate("a kite", height=32, width=32, steps=1, num=3)) == 3
    assert kept == [True] and slots == [3]
    with pytest.raises(InputError, match="batch is 0; give a whole number of at least 1"):
        qk_jax.load(checkpoint, batch=0)


def test_import_is_light():
    heavy = "jax numpy transformers flax torch diffusers".split()
    code = f"import sys, qk_jax; print([m for m in {heavy} if m in sys.modules], dir(qk_jax))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("[] ") and "'load_vlm'" in out.stdout
    assert qk_jax.load is trained.load
    with pytest.raises(AttributeError, match="load_unet"):
        qk_jax.load_unet  # noqa: B018


def wrong_vlm(ours):
    ids, mask, pixels, thw = sequences("left")
    vlm = functools.partial(ours("vlm"), ids, mask)
    hidden = np.where(ids == IMAGE, 0, mask)
    ordered = thw[::-1]
    return {
        "ids": (lambda: ours("vlm")(ids[0]), r"input_ids has the shape \(\d+,\)"),
        "float ids": (lambda: ours("vlm")(ids * 0.5), "whole numbers"),
        "vocabulary": (lambda: ours("vlm")(ids + 60), "the vocabulary has 60"),
        "mask": (lambda: ours("vlm")(ids, mask[:1], pixels, thw), "attention_mask has the shape"),
        "no pixels": (lambda: vlm(None, thw), "pixel_values is missing"),
        "no grids": (lambda: vlm(pixels), "image_grid_thw is missing"),
        "flat grids": (lambda: vlm(pixels, thw[0]), r"give whole numbers \[pictures, 3\]"),
        "video": (lambda: vlm(pixels, thw + [1, 0, 0]), "still pictures"),
        "odd grid": (lambda: vlm(pixels, thw + [0, 1, 0]), "multiples of 2"),
        "pixels": (lambda: vlm(pixels[1:], thw), r"give \(80, 1176\)"),
        "tokens": (lambda: vlm(pixels[:56], thw[:2]), r"has 20 .* 2 pictures .* need 14"),
        "no pictures": (vlm, "0 pictures of image_grid_thw need 0"),
        "order": (lambda: vlm(pixels, ordered), "row 0 of input_ids"),
        "hidden": (lambda: ours("vlm")(ids, hidden, pixels, thw), "attention_mask hides"),
    }


def wrong_mmdit(ours):
    hidden, context, mask, time, shapes = tokens(nano.MMDIT)
    run = ours("mmdit")
    mixed = [shapes[0], [(1, 4, 6), (1, 5, 3), (1, 2, 2)]]
    return {
        "hidden": (lambda: run(hidden[..., 1:], context, mask, time, shapes), "hidden_states"),
        "context": (lambda: run(hidden, context[:1], mask, time, shapes), r"give \[2, tokens, 24"),
        "mask": (lambda: run(hidden, context, mask[:, 1:], time, shapes), "_mask has the shape"),
        "time": (lambda: run(hidden, context, mask, time[:1], shapes), "timestep has the shape"),
        "count": (lambda: run(hidden, context, mask, time, shapes[0][:2]), "has 39 tokens"),
        "rows": (lambda: run(hidden, context, mask, time, shapes[:1] * 3), "has 3 rows"),
        "mixed": (lambda: run(hidden, context, mask, time, mixed), "2 different"),
        "frames": (lambda: run(hidden, context, mask, time, [(2, 4, 6)]), r"\(2, 4, 6\)"),
        "pairs": (lambda: run(hidden, context, mask, time, [(4, 6)]), "img_shapes is"),
        "nothing": (lambda: run(hidden, context, mask, time, []), "img_shapes is"),
    }


def wrong_vae(ours):
    x, kl = np.zeros((1, 16, 16, 3), np.float32), ours("kl")
    return {
        "layout": (lambda: kl.encode(x.transpose(0, 3, 1, 2)), r"\[batch, height, width, 3\]"),
        "bytes": (lambda: kl.encode(x.astype(np.uint8)), "x / 127.5 - 1"),
        "sides": (lambda: kl.encode(x[:, :12]), "multiples of 8"),
        "latents": (lambda: kl.decode(x), r"width / 8, 4\]"),
        "folder": (lambda: qk_jax.load_vae("/no/such/folder"), "/no/such/folder"),
    }


@pytest.mark.parametrize("wrong", [wrong_vlm, wrong_mmdit, wrong_vae])
def test_wrong_arguments_are_named(wrong, ours):
    for case, (call, words) in wrong(ours).items():
        with pytest.raises(InputError, match=words) as error:
            call()
        assert "\n" not in str(error.value), case


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"height": 33}, "no multiple of 16"),
        ({"height": 0, "source": painters.picture(0)}, "no multiple of 16"),
        ({"width": None}, "width is None; give"),
        ({"height": "32"}, "height is '32'; give"),
        ({"height": 4096, "width": 4096}, "choose a smaller"),
        ({"source": painters.picture(0) / 255}, "source is an array float64"),
        ({"source": "no.png"}, "no.png cannot be read"),
        ({"references": painters.picture(0)}, r"references\[0\] is an array uint8 \(40, 3\)"),
        ({"references": "one.png"}, "give a list"),
        ({"references": [painters.picture(0)] * 4}, "at most 3"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"solver": "magic"}, "solver is 'magic'"),
        ({"seed": -1}, "seed is -1"),
        ({"num": 0}, "num is 0"),
        ({"num": 1.5}, "num is 1.5"),
        ({"seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"seed": "3"}, "seed is '3'"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"guidance": "4"}, "guidance is '4'"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"renormalize": "no"}, "renormalize is 'no'"),
        ({"references": None}, "references is None; give a list"),
        ({"cfg": 3.0}, "there is no setting 'cfg'"),
    ],
)
def test_generate_names_what_is_wrong(given, words, model):
    with pytest.raises(InputError, match=words):
        model.generate(**({"prompt": "a kite", "height": 32, "width": 32} | given))


def test_load_names_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="give the folder of a stage"):
        qk_jax.load(tmp_path)
