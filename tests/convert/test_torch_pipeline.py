"""The exported pipeline in PyTorch against ours: its parts, and pictures from the same noise."""

import copy
import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import qk_jax
from qk_jax import painting
from qk_jax.convert import __main__ as command
from qk_jax.convert import torch_folder, torch_import, torch_pipeline, verify
from qk_jax.data import prompts
from qk_jax.errors import InputError
from qk_jax.models import mmdit, mrope, query_kontext, qwen_vl, rotary
from tests import painters
from tests.convert import nano

TOKENIZER = pathlib.Path(qk_jax.__file__).parent / "assets" / "tiny" / "tokenizer"
GRIDS = ((4, 4), (4, 6), (2, 3), (5, 4))


@pytest.mark.parametrize("roles", [(), (0,), (1,), (0, 1, 1), (1, 0, 1), (0, 0)])
@pytest.mark.parametrize("mode", ["reflect", "reflect_minus_one", "translate"])
@pytest.mark.parametrize("base", [0, 1])
def test_shifted_positions(roles, mode, base):
    grids = GRIDS[: len(roles) + 1]
    law = rotary.PositionLaw("shifted", mode, base)
    ours = rotary.image_positions(law, grids[0], grids[1:], jnp.asarray([roles], jnp.int32))
    theirs = torch_pipeline.shifted_positions(grids, roles, mode, base)
    np.testing.assert_array_equal(ours[0], theirs)


def test_centred_positions_and_rotations():
    law = rotary.PositionLaw("qwen_image")
    roles = jnp.zeros((1, 3), jnp.int32)
    ours = rotary.image_positions(law, GRIDS[0], GRIDS[1:], roles)[0]
    theirs = torch_pipeline.centred_positions(GRIDS)
    np.testing.assert_array_equal(ours, theirs)
    tables = torch_pipeline.Positions((4, 6, 6))
    cos, sin = rotary.cos_sin(ours, (4, 6, 6))
    np.testing.assert_allclose(tables.rotations(theirs), cos + 1j * sin, atol=1e-6)


def test_patches_and_sizes():
    picture = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    size = mrope.vision_size(48, 80, 84 * 84)
    assert torch_pipeline.vision_size(48, 80, 84 * 84) == size
    ours = prompts.patches(picture, size)
    np.testing.assert_array_equal(torch_pipeline.patches(picture, *size), ours)


def test_mrope_positions():
    grids = ((4, 6), (6, 2))
    pictured = np.array([0] * 3 + [1] * 6 + [0] * 2 + [1] * 3 + [0] * 4)
    config = type("Config", (), {"image_token_id": 1})
    ours = mrope.mrope_positions(pictured[None], np.ones((1, len(pictured))), grids, config)
    theirs = torch_pipeline.mrope_positions(torch.from_numpy(pictured == 1), grids)
    np.testing.assert_array_equal(ours[0], theirs[:, 0])


def test_packing():
    z = np.random.default_rng(0).standard_normal((1, 6, 4, 3)).astype(np.float32)
    tensor = torch.from_numpy(z).permute(0, 3, 1, 2)
    packed = torch_pipeline.pack(tensor)
    np.testing.assert_array_equal(mmdit.pack(z), packed)
    assert torch.equal(torch_pipeline.unpack(packed, 6, 4), tensor)


# Size (height, width), whether there is a source, number of references, settings.
CASES = {
    "text": ((64, 64), False, 0, painting.Settings(steps=3)),
    "no_guidance": ((48, 80), False, 0, painting.Settings(steps=3, guidance=1)),
    "source": ((48, 80), True, 0, painting.Settings(steps=3)),
    "reference_heun": ((80, 48), False, 1, painting.Settings(steps=3, solver="heun")),
    "two": ((64, 64), True, 1, painting.Settings(steps=3, image_guidance=1)),
    "three": ((48, 80), False, 3, painting.Settings(steps=3)),
    "three_bare": ((80, 48), True, 2, painting.Settings(steps=3, guidance=1, image_guidance=1)),
}
SHIFTED = rotary.PositionLaw()
RUN = {"stage": "stage3", "data": {"tasks": {"editing": 0.5, "composition": 0.0}, "corpus": ""}}


@functools.cache
def painter(law, vae_kind="kl", latents=True):
    """A random painter of nano size with the tiny tokenizer."""
    config = query_kontext.ModelConfig(
        vlm=dataclasses.replace(
            nano.VLM,
            text=dataclasses.replace(nano.VLM.text, vocab_size=2048),
            **{
                name: getattr(qwen_vl.PRESETS["tiny"], name)
                for name in (
                    "image_token_id", "video_token_id", "vision_start_token_id",
                    "vision_end_token_id",
                )
            },
        ),
        mmdit=dataclasses.replace(nano.MMDIT, zero_cond_t=law.kind == "shifted"),  # both ways
        vae=nano.KINDS[vae_kind].config,
        num_queries=3,
        max_text=20,
        vlm_pixels=56 * 56,
        law=law,
        condition_latents=latents,
    )  # fmt: skip
    model = query_kontext.QueryKontext(config)
    params = nano.random_tree(torch_import.shapes_of(model.abstract()))
    layout = prompts.PromptLayout(prompts.load_tokenizer(TOKENIZER), 20, 3, config.vlm_pixels)
    limits = painting.Limits(((64, 64), (48, 80), (80, 48)), 48, 3, 10**6)
    return painting.Painter(config, params, layout, limits=limits, batch=1, name="nano")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(law, vae kind, dtype) -> (painter, folder, pipeline), each exported once."""

    @functools.cache
    def export(law=SHIFTED, vae_kind="kl", dtype="float32", latents=True):
        folder = tmp_path_factory.mktemp("export") / "model"
        ours = painter(law, vae_kind, latents)
        torch_folder.export_pipeline(ours, folder, RUN, 7, dtype)
        return ours, folder, verify.load_pipeline(folder)

    return export


def request_of(ours, case):
    size, has_source, count, settings = CASES[case]
    rng = np.random.default_rng(0)
    side = ours.limits.reference_size
    source = rng.integers(0, 256, (*size, 3), dtype=np.uint8) if has_source else None
    references = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    return painting.Request("a kite <|im_end|> é", source, tuple(references), size, 1), settings


def assert_paints_the_same(ours, pipe, case):
    request, settings = request_of(ours, case)
    noise = ours.noise(request)
    (painted,) = ours.paint_with_noise([request], [noise], settings)
    theirs = pipe(
        request.prompt,
        source=None if request.source is None else Image.fromarray(request.source),
        references=[Image.fromarray(x) for x in request.references],
        height=request.size[0],
        width=request.size[1],
        num_inference_steps=settings.steps,
        guidance=settings.guidance,
        image_guidance=settings.image_guidance,
        solver=settings.solver,
        latents=torch.from_numpy(noise.copy()).permute(2, 0, 1)[None],
    ).images[0]
    assert painted.std() > 10
    assert np.abs(painted.astype(int) - np.asarray(theirs).astype(int)).max() <= 2


@pytest.mark.parametrize("case", CASES)
def test_the_same_noise_gives_the_same_picture(exported, case):
    ours, _, pipe = exported()
    assert_paints_the_same(ours, pipe, case)


@pytest.mark.parametrize("case", ["no_guidance", "three"])
def test_the_law_of_qwen_image_gives_the_same_picture(exported, case):
    ours, _, pipe = exported(rotary.PositionLaw("qwen_image"))
    assert_paints_the_same(ours, pipe, case)


def test_the_vae_of_qwen_image_gives_the_same_picture(exported):
    ours, _, pipe = exported(SHIFTED, "qwen_vae")
    assert_paints_the_same(ours, pipe, "three_bare")


@pytest.mark.parametrize("kind", ["shifted", "qwen_image"])
def test_a_model_that_only_reads_pictures_gives_the_same_picture(exported, kind):
    ours, _, pipe = exported(rotary.PositionLaw(kind), latents=False)
    assert_paints_the_same(ours, pipe, "source")


def test_verify_passes_in_every_type_and_finds_one_changed_weight(exported, capsys):
    for dtype in ("float32", "float16"):
        ours, folder, _ = exported(SHIFTED, "kl", dtype)
        assert verify.verify(ours, folder)
        table = capsys.readouterr().out
        assert f"weights in {dtype}" in table and table.count("painted picture") == 3
    changed = copy.copy(ours)
    norm = {"scale": ours.params["mmdit"]["txt_norm"]["scale"] + 1}
    changed.params = ours.params | {"mmdit": ours.params["mmdit"] | {"txt_norm": norm}}
    assert not verify.verify(changed, folder)
    assert "transformer: " in capsys.readouterr().out.split("<- too large")[0]


def test_verify_refuses_what_is_no_export_of_this_model(exported, tmp_path):
    ours, folder, _ = exported()
    with pytest.raises(InputError, match="holds no model_index.json"):
        verify.verify(ours, tmp_path)
    other = copy.copy(ours)
    other.config = dataclasses.replace(ours.config, vlm_pixels=28 * 28)
    with pytest.raises(InputError, match="has vlm_pixels = 3136, the checkpoint 784"):
        verify.verify(other, folder)
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="is truncated or no safetensors file"):
        verify.verify(ours, tmp_path / "copy")
    (tmp_path / "copy" / "pipeline.py").write_text("1 / 0")
    with pytest.raises(InputError, match="diffusers cannot load"):
        verify.load_pipeline(tmp_path / "copy")


def test_the_folder_says_what_it_is(exported):
    _, folder, pipe = exported()
    card = (folder / "README.md").read_text()
    assert "stage3, after 7 steps" in card and "editing (0.5)" in card and "64x64 80x48" in card
    assert "jax" not in (folder / "pipeline.py").read_text().lower()
    assert type(pipe).__name__ == "QueryKontextPipeline"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "kontext", "model_index.json", "pipeline.py", "scheduler", "text_encoder",
        "tokenizer", "transformer", "vae",
    ]  # fmt: skip


def test_the_pipeline_needs_no_jax(exported, tmp_path):
    _, folder, _ = exported()
    code = f"""
import sys
sys.modules["jax"] = sys.modules["flax"] = sys.modules["qk_jax"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(
    {str(folder)!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True
)
pipe("a kite", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": 3}, "there is no prompt"),
        ({"prompt": "kite " * 30}, "the prompt has .* tokens, over 20"),
        ({"height": 40, "width": 64}, "the size 64x40 is no multiple of 16"),
        ({"solver": "dpm"}, "solver is 'dpm'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"references": [None] * 4}, "4 references are given, the model knows 3"),
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
    assert pipe._size(image) == request.size
    source = torch_pipeline.fit_source(image, *request.size)
    reference = torch_pipeline.fit_reference(image, ours.limits.reference_size)
    np.testing.assert_array_equal(source, request.source)
    np.testing.assert_array_equal(reference, request.references[0])
    assert pipe._size(None) == ours.fit("a kite").size


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
