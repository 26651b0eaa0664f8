"""The exported pipeline in PyTorch against ours: its parts, and pictures from the same noise."""

import dataclasses
import functools
import io
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from qk_jax import convert as command
from qk_jax import painting
from qk_jax.base.errors import InputError
from qk_jax.data import prompts
from qk_jax.export import kontext, pipeline, verify
from qk_jax.export.folder import export_pipeline, separate
from qk_jax.models import lora, mmdit, query_kontext, rotary
from qk_jax.pictures.decoding import decode_picture
from qk_jax.pictures.grids import mrope_positions, vision_size
from qk_jax.weights.read import shapes_of
from tests.export.models import loaded, painter
from tests.painting import painters
from tests.pictures import encoded
from tests.weights import nano

GRIDS = ((4, 4), (4, 6), (2, 3), (5, 4))


@pytest.mark.parametrize("roles", [(), (0,), (1,), (0, 1, 1), (1, 0, 1), (0, 0)])
@pytest.mark.parametrize("mode", ["reflect", "reflect_minus_one", "translate"])
@pytest.mark.parametrize("base", [0, 1])
def test_shifted_positions(roles, mode, base):
    grids = GRIDS[: len(roles) + 1]
    law = rotary.PositionLaw("shifted", mode, base)
    ours = rotary.image_positions(law, grids[0], grids[1:], jnp.asarray([roles], jnp.int32))
    theirs = kontext.shifted_positions(grids, roles, mode, base)
    np.testing.assert_array_equal(ours[0], theirs)


def test_centred_positions_and_rotations():
    law = rotary.PositionLaw("qwen_image")
    roles = jnp.zeros((1, 3), jnp.int32)
    ours = rotary.image_positions(law, GRIDS[0], GRIDS[1:], roles)[0]
    theirs = kontext.centred_positions(GRIDS)
    np.testing.assert_array_equal(ours, theirs)
    tables = kontext.Positions((4, 6, 6))
    cos, sin = rotary.cos_sin(ours, (4, 6, 6))
    np.testing.assert_allclose(tables.rotations(theirs), cos + 1j * sin, atol=1e-6)


def test_patches_and_sizes():
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    size = vision_size(48, 80, 84 * 84)
    assert pipeline.vision_size(48, 80, 84 * 84) == size
    ours = prompts.patches(picture, size)
    np.testing.assert_array_equal(pipeline.patches(picture, *size), ours)


def test_mrope_positions():
    grids = ((4, 6), (6, 2))
    pictured = np.array([0] * 3 + [1] * 6 + [0] * 2 + [1] * 3 + [0] * 4)
    ours = mrope_positions(pictured[None], np.ones((1, len(pictured))), grids, 1)
    theirs = pipeline.mrope_positions(torch.from_numpy(pictured == 1), grids)
    np.testing.assert_array_equal(ours[0], theirs[:, 0])


def test_packing():
    z = np.random.default_rng(0).standard_normal((1, 6, 4, 3)).astype(np.float32)
    tensor = torch.from_numpy(z).permute(0, 3, 1, 2)
    packed = pipeline.pack(tensor)
    np.testing.assert_array_equal(mmdit.pack(jnp.asarray(z)), packed)
    assert torch.equal(pipeline.unpack(packed, 6, 4), tensor)


# Size (height, width), whether there is a source, number of references, settings. `verify`, whose
# tests are below, adds words alone, a source and two references at (64, 64) with all guidance.
CASES = {
    "no_guidance": ((48, 80), False, 0, painting.Settings(steps=3, guidance=1)),
    "reference_heun": ((80, 48), False, 1, painting.Settings(steps=3, solver="heun")),
    "two": ((64, 64), True, 1, painting.Settings(steps=3, image_guidance=1)),
    "three": ((48, 80), False, 3, painting.Settings(steps=3)),
    "three_bare": ((80, 48), True, 2, painting.Settings(steps=3, guidance=1, image_guidance=1)),
    "symmetric": (
        (64, 64),
        True,
        0,
        painting.Settings(
            steps=4,
            guidance_end=1.5,
            guidance_interval=(0.3, 0.9),
            renormalize=True,
            symmetric_guidance=True,
        ),
    ),
    "late": ((64, 64), False, 0, painting.Settings(steps=3, zero_init_steps=1)),
    "wide": ((32, 96), True, 0, painting.Settings(steps=2, guidance=1, image_guidance=1)),
}
# The law of positions, and whether condition pictures are modulated as clean ones.
LAWS = {
    "shifted": (rotary.PositionLaw(), False),
    "minus_one": (rotary.PositionLaw("shifted", "reflect_minus_one", 1), True),
    "translate": (rotary.PositionLaw("shifted", "translate"), False),
    "qwen_image": (rotary.PositionLaw("qwen_image"), False),
    "qwen_image_zero": (rotary.PositionLaw("qwen_image"), True),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(arguments of `loaded`, dtype) -> (painter, folder, pipeline), each written once."""

    @functools.cache
    def export(*args, dtype="float32", **kwargs):
        folder = tmp_path_factory.mktemp("export") / "model"
        export_pipeline(loaded(*args, **kwargs), folder, dtype)
        return painter(*args, **kwargs), folder, verify.load_pipeline(folder)

    return export


def request_of(ours, case):
    size, has_source, count, settings = CASES[case]
    rng = np.random.default_rng(0)
    (((side, _),),) = ours.limits.reference_sizes
    source = rng.integers(0, 256, (*size, 3), dtype=np.uint8) if has_source else None
    references = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    return painting.Request("a kite <|im_end|> é", source, tuple(references), size, 1), settings


def assert_paints_the_same(ours, pipe, case):
    request, settings = request_of(ours, case)
    noise = ours.noise(request)
    (painted,) = ours.paint([request], settings, [noise])
    theirs = verify.paint(pipe, request, settings, noise)
    assert painted.std() > 10
    assert np.abs(painted.astype(int) - theirs.astype(int)).max() <= 2


@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_gives_the_same_picture(exported, case):
    ours, _, pipe = exported()
    assert_paints_the_same(ours, pipe, case)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_gives_the_same_picture(exported, name):
    law, zero = LAWS[name]
    ours, _, pipe = exported(law, zero=zero)
    assert pipe.transformer.config.zero_cond_t == zero
    assert_paints_the_same(ours, pipe, "three_bare")


@pytest.mark.parametrize("case", ["two", "three_bare"])
def test_the_prompts_of_qwen_image_give_the_same_picture(exported, case):
    """With renormalised guidance, which its law has by default, and words before the kontext."""
    ours, _, pipe = exported(rotary.PositionLaw("qwen_image"), prompt="qwen_image")
    assert_paints_the_same(ours, pipe, case)


@pytest.mark.parametrize("case", ["no_guidance", "three_bare"])
def test_the_vae_of_qwen_image_gives_the_same_picture(exported, case):
    ours, _, pipe = exported(vae_kind="qwen_vae")
    assert_paints_the_same(ours, pipe, case)


@pytest.mark.parametrize("kind", ["shifted", "qwen_image"])
def test_a_model_that_only_reads_pictures_gives_the_same_picture(exported, kind):
    ours, _, pipe = exported(rotary.PositionLaw(kind), latents=False)
    assert_paints_the_same(ours, pipe, "wide")


@functools.cache
def adapted():
    """(checkpoint, painter) of the same model with a random adapter."""
    base = loaded()
    shapes = jax.eval_shape(
        lambda params: lora.init(jax.random.key(0), params, lora.MMDIT_TARGETS, rank=2),
        base.params["mmdit"],
    )
    adapter = nano.random_tree(shapes_of(shapes), seed=1)
    found = dataclasses.replace(base, params=base.params | {"lora": {"mmdit": adapter}})
    return found, painting.of_loaded(found, batch=1)


def test_a_separate_adapter_paints_as_the_merged_one(tmp_path):
    found, merged = adapted()
    export_pipeline(found, tmp_path / "model", "float32", lora="separate")
    pipe = verify.load_pipeline(tmp_path / "model")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert_paints_the_same(merged, pipe, "three_bare")
    pipe.disable_lora()
    assert_paints_the_same(painter(), pipe, "three_bare")
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_paints_the_same(merged, pipe, "three_bare")


def test_verify_passes_in_every_type_and_finds_one_changed_weight(exported, capsys):
    ours = loaded()
    for dtype in ("float32", "float16"):
        _, folder, _ = exported(dtype=dtype)
        assert verify.verify(ours, folder)
        table = capsys.readouterr().out
        assert f"weights in {dtype}" in table
        for line in ("VLM states", "context", "velocity", "decoded picture", "painted picture"):
            assert table.count(f": {line}") == 3
        assert table.count(": latents") == 3  # of a source, and of two references
    norm = {"scale": ours.params["mmdit"]["txt_norm"]["scale"] + 1}
    generator = ours.params["mmdit"] | {"txt_norm": norm}
    changed = dataclasses.replace(ours, params=ours.params | {"mmdit": generator})
    assert not verify.verify(changed, folder)
    assert "transformer: " in capsys.readouterr().out.split("<- too large")[0]


def test_layers_noise_and_bidirectional_queries_are_exported(exported, capsys):
    switches = (
        ("vlm_layers", (1,)), ("bidirectional_queries", True), ("query_noise", 0.5)
    )  # fmt: skip
    ours = loaded(switches=switches)
    _, folder, pipe = exported(switches=switches)
    assert verify.verify(ours, folder), capsys.readouterr().out
    assert pipe.kontext.config.layers == [1]
    drawn = pipe.kontext.queries.detach().numpy() - ours.params["queries"]["embedding"]
    assert 0.3 < drawn.std() < 0.7  # the one draw that painters take
    causal = dataclasses.replace(ours.plan.model.config, bidirectional_queries=False)
    plan = dataclasses.replace(ours.plan, model=query_kontext.QueryKontext(causal))
    assert not verify.verify(dataclasses.replace(ours, plan=plan), folder)


def test_verify_reads_a_separate_adapter(tmp_path, capsys):
    found, merged = adapted()
    folder = tmp_path / "model"
    export_pipeline(found, folder, "bfloat16", lora="separate")
    assert verify.verify(found, folder)
    assert "adapter: 48 tensors" in capsys.readouterr().out
    with pytest.raises(InputError, match="trained no adapter"):
        verify.verify(loaded(), folder)
    changed = jax.tree.map(lambda leaf: leaf + 1, found.params["lora"])
    other = dataclasses.replace(found, params=found.params | {"lora": changed})
    lines = list(verify.tensors(merged, folder, separate(other)))
    assert [line.name.split(":")[0] for line in lines if not line.is_good] == ["adapter"]


def test_verify_refuses_what_is_no_export_of_this_model(exported, tmp_path):
    ours, (_, folder, _) = loaded(), exported()
    with pytest.raises(InputError, match="holds no model_index.json"):
        verify.verify(ours, tmp_path)
    config = dataclasses.replace(ours.plan.model.config, vlm_pixels=28 * 28)
    plan = dataclasses.replace(ours.plan, model=query_kontext.QueryKontext(config))
    with pytest.raises(InputError, match="has vlm_pixels = 3136, the checkpoint 784"):
        verify.verify(dataclasses.replace(ours, plan=plan), folder)
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="is truncated or no safetensors file"):
        verify.verify(ours, tmp_path / "copy")
    (tmp_path / "copy" / "pipeline.py").write_text("1 / 0")
    with pytest.raises(InputError, match="diffusers cannot load"):
        verify.load_pipeline(tmp_path / "copy")


def test_the_folder_paints_from_the_command_line_without_jax(exported, tmp_path):
    ours, folder, _ = exported()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    picture.save(tmp_path / "in.png")
    arguments = [
        "pipeline.py", "--prompt", "a kite", "--source", "in.png", "--reference", "in.png",
        "--size", "80x48", "--steps", "1", "--seed", "3", "--out", "out.png",
    ]  # fmt: skip
    code = f"""
import runpy, sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["qk_jax"] = None
sys.argv = {arguments}
runpy.run_path({str(folder / "pipeline.py")!r}, run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    with Image.open(tmp_path / "out.png") as painted:
        assert painted.size == (80, 48)


SMALL = Image.new("RGB", (32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": 3}, "there is no prompt"),
        ({"prompt": "kite " * 30}, "the prompt has .* tokens, over 20"),
        ({"height": 40, "width": 64}, "the size 64x40 is no multiple of 16"),
        ({"solver": "dpm"}, "solver is 'dpm'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"references": [SMALL] * 4}, "4 references are given, the model knows 3"),
        ({"references": SMALL}, "references is no list; give a list of pictures"),
        ({"references": ["a.png"]}, "a picture is a str; open it with PIL.Image.open"),
        ({"source": "a.png"}, "a picture is a str; open it with PIL.Image.open"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents have the shape"),
    ],
)
def test_the_pipeline_says_what_it_cannot_paint(exported, arguments, message):
    _, _, pipe = exported()
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a kite"} | arguments)


@pytest.mark.parametrize(
    "shape", [(30, 71, 4), (71, 30, 3), (48, 48, 4), (16, 16, 3), (300, 90, 4)]
)
def test_pictures_of_any_size_are_fitted_alike(exported, shape, tmp_path):
    ours, _, pipe = exported()
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    picture = ours.read(tmp_path / "a.png")
    request = ours.fit("a kite", picture, [picture])
    shown = pipe.kontext.picture(image)
    assert pipe._size(shown) == request.size
    source = pipeline.fit_source(shown, *request.size)
    (known,) = ours.limits.reference_sizes
    reference = pipeline.fit_reference(shown, *pipeline.nearest(shown, known))
    np.testing.assert_array_equal(source, request.source)
    np.testing.assert_array_equal(reference, request.references[0])
    assert pipe._size(None) == ours.fit("a kite").size


def test_pictures_are_prepared_as_for_painting(exported, monkeypatch):
    """Upright, over white, and each reference at the nearest of several sizes."""
    ours, _, pipe = exported()
    sizes = ((48, 48), (64, 32), (32, 64))
    limits = dataclasses.replace(ours.limits, reference_sizes=(sizes,))
    ours = painting.Painter(ours.config, ours.params, ours.prompts, limits=limits)
    rng, found = np.random.default_rng(0), []
    shapes = [(49, 50), (20, 50), (50, 20), (30, 31)]
    pictures = [rng.integers(0, 256, (*shape, 4), dtype=np.uint8) for shape in shapes]
    files = [
        encoded.turned(x, number, "PNG") for x, number in zip(pictures, (6, 5, 8, 1), strict=True)
    ]
    decoded = [decode_picture(x, "RGB", 0, "it") for x in files]
    assert [x.shape[:2] for x in decoded] == shapes
    request = ours.fit("a kite", decoded[0], decoded[1:])
    monkeypatch.setattr(pipe, "encode_context", lambda *given: found.append(given) or 1 / 0)
    old = pipe.config.reference_sizes
    pipe.register_to_config(reference_sizes="48x48 32x64 64x32")
    images = [Image.open(io.BytesIO(x)) for x in files]
    with pytest.raises(ZeroDivisionError):
        pipe("a kite", images[0], images[1:])
    pipe.register_to_config(reference_sizes=old)
    ((_, shown, roles),) = found
    assert tuple(roles) == request.roles and shown[0].shape[:2] == request.size
    assert [x.shape[:2] for x in shown[1:]] == [(32, 64), (64, 32), (48, 48)]
    for theirs, own in zip(shown, request.pictures, strict=True):
        np.testing.assert_array_equal(theirs, own)


def test_references_by_number_are_exported(tmp_path):
    """The folder shows as many references at the same sizes, and paints the same pictures."""
    base = loaded()
    config = base.plan.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.reference_sizes_by_number = (64, 48)
        config.data.reference_ratios = ((1, 1), (2, 3))
    found = dataclasses.replace(base, plan=dataclasses.replace(base.plan, config=config))
    ours = painting.of_loaded(found, batch=1)
    export_pipeline(found, tmp_path / "model", "float32")
    assert verify.verify(found, tmp_path / "model", lambda line: None)
    pipe = verify.load_pipeline(tmp_path / "model")
    assert pipe.config.reference_sizes == "64x64 48x80 80x48; 48x48 32x48 48x32"
    rng, seen = np.random.default_rng(0), []
    pipe.encode_context = lambda *given: seen.append(given) or 1 / 0
    for count in (1, 2, 3):
        pictures = [rng.integers(0, 256, (70, 50 + n, 3), dtype=np.uint8) for n in range(count)]
        with pytest.raises(ZeroDivisionError):
            pipe("a kite", references=[Image.fromarray(picture) for picture in pictures])
        for theirs, own in zip(seen[-1][1], ours.fit("x", None, pictures).pictures, strict=True):
            np.testing.assert_array_equal(theirs, own)
            assert own.shape[:2] in ours.limits.reference_sizes[min(count, 2) - 1]


def test_the_command_writes_verifies_and_answers_in_one_line(capsys, tmp_path):
    stage, out = str(painters.save(tmp_path)), tmp_path / "out"
    command.main(["to-pytorch", "--checkpoint", stage, "--out", str(out), "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"{out}\n"
    command.main(["verify", "--checkpoint", stage, "--pytorch", str(out)])
    assert "weights in bfloat16" in capsys.readouterr().out
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").write_text("")
    for arguments, message in (
        (["verify", "--checkpoint", stage, "--pytorch", str(tmp_path)], "no model_index.json"),
        (["to-pytorch", "--checkpoint", stage, "--out", str(tmp_path / "thesis")], "no earlier"),
        (["to-pytorch", "--checkpoint", str(tmp_path / "none"), "--out", str(out)], "none"),
        (["to-pytorch", "--checkpoint", stage], "--out"),
        (["to-torch"], "to-torch"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
