"""What the exported pipeline is asked for, it does, or it says by name why not."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from qk_jax.export import card, pipeline, verify
from qk_jax.export.folder import export_pipeline
from tests.export.models import loaded


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_pipeline(loaded(), folder, "float32")
    return verify.load_pipeline(folder)


@pytest.fixture
def scheduler(pipe):
    """Puts back the pipeline's scheduler when a test has taken another one."""
    own = pipe.scheduler
    yield own
    pipe.scheduler = own


def picture(height=40, width=60):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise(count=1, height=32, width=48):
    seed = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, height // 8, width // 8, generator=seed)


def paint(pipe, prompt="a kite", **more):
    """Two steps without guidance, unless asked otherwise."""
    fast = {"num_inference_steps": 2, "guidance": 1, "image_guidance": 1}
    return pipe(prompt, **fast | more).images


# The trained sizes of the model are 64x64, 80x48 and 48x80 (width x height); pictures are 60 wide
# and 40 high.
@pytest.mark.parametrize(
    ("asked", "source", "size"),
    [
        ({}, None, (64, 64)),
        ({"height": 32}, None, (32, 32)),
        ({"width": 96}, None, (96, 96)),
        ({"height": 32}, (40, 60), (48, 32)),
        ({"width": 96}, (40, 60), (96, 64)),
        ({"width": 32}, (40, 60), (32, 16)),
        ({"height": 16}, (60, 40), (16, 16)),
        ({"height": 32}, (400, 4), (16, 32)),
        ({"height": 48, "width": 32}, (40, 60), (32, 48)),
        ({}, (40, 60), (80, 48)),
    ],
)
def test_one_side_alone_takes_the_other_from_the_source_or_the_first_trained_size(
    pipe, asked, source, size
):
    (painted,) = paint(pipe, source=source and picture(*source), num_inference_steps=1, **asked)
    assert painted.size == size


def test_every_output_type_is_diffusers(pipe):
    given = {"height": 32, "width": 48, "latents": noise()}
    (pil,) = paint(pipe, **given)
    array, tensor, z = (paint(pipe, **given, output_type=kind) for kind in ("np", "pt", "latent"))
    assert array.dtype == np.float32 and array.shape == (1, 32, 48, 3)
    assert tensor.dtype == torch.float32 and tensor.shape == (1, 3, 32, 48)
    assert 0 <= array.min() < 0.4 and 0.6 < array.max() <= 1
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1), array)
    processor = diffusers.image_processor.VaeImageProcessor()
    with torch.no_grad():
        decoded = 2 * pipe.decode_latents(z) - 1
    for kind, ours in (("np", array), ("pt", tensor), ("pil", pil)):
        theirs = processor.postprocess(decoded, output_type=kind)
        theirs = theirs[0] if kind == "pil" else theirs
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-6)


def test_a_list_of_prompts_paints_one_picture_for_each(pipe):
    prompts, given = ["a kite", "a red hat on a table"], {"height": 32, "width": 48}
    both = paint(pipe, prompts, **given, latents=noise(2), output_type="np", guidance=3)
    assert both.shape == (2, 32, 48, 3)
    for number, prompt in enumerate(prompts):
        own = noise(2)[number : number + 1]
        alone = paint(pipe, prompt, **given, latents=own, output_type="np", guidance=3)
        np.testing.assert_array_equal(alone[0], both[number])
    assert np.abs(both[0] - both[1]).max() > 0.01
    source = picture()
    edited = paint(pipe, tuple(prompts), source=source, references=[source], **given)
    assert [x.size for x in edited] == [(48, 32)] * 2


def test_the_noise_is_the_generators(pipe):
    given = {"height": 32, "width": 48, "output_type": "np"}
    seeded = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    two = paint(pipe, ["a kite"] * 2, **given, generator=seeded(1)[0])
    assert np.abs(two[0] - two[1]).max() > 0.1
    one_each = paint(pipe, ["a kite"] * 2, **given, generator=seeded(1, 1))
    np.testing.assert_array_equal(one_each[0], one_each[1])
    np.testing.assert_array_equal(one_each[0], two[0])
    np.testing.assert_array_equal(paint(pipe, **given, generator=seeded(1)[0])[0], two[0])


def diffusers_steps(pipe, x, steps, generator):
    """Tokens after all steps, as diffusers' own pipelines drive the scheduler; a height of 32."""
    pipe._sigmas(steps, x.shape[1])  # sets the timesteps
    context = pipe.encode_context("a kite", [], [])
    for t in pipe.scheduler.timesteps:
        v = pipe.velocity(x, t / 1000, context, [], [(2, 3)], [])
        x = pipe.scheduler.step(v, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stochastic_sampling": True},
        {"use_dynamic_shifting": False, "shift": 3.0},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"time_shift_type": "linear", "shift_terminal": None},
    ],
)
def test_the_schedulers_settings_are_followed(pipe, scheduler, settings):
    plain = paint(pipe, height=32, width=48, latents=noise(), output_type="latent")
    pipe.scheduler = type(scheduler).from_config(scheduler.config, **settings)
    seed = torch.Generator().manual_seed(5)
    ours = paint(
        pipe, height=32, width=48, latents=noise(), output_type="latent", num_inference_steps=4,
        generator=seed,
    )  # fmt: skip
    with torch.no_grad():
        seed.manual_seed(5)
        theirs = diffusers_steps(pipe, pipeline.pack(noise()), 4, seed)
    torch.testing.assert_close(ours, pipeline.unpack(theirs, 4, 6), rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "arguments", "message"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}, {}, "is a FlowMatchHeunDiscreteScheduler"),
        ("FlowMatchLCMScheduler", {}, {}, "is a FlowMatchLCMScheduler"),
        ("EulerDiscreteScheduler", {}, {}, "is a EulerDiscreteScheduler; .*solver='euler'"),
        ("UniPCMultistepScheduler", {}, {}, "is a UniPCMultistepScheduler"),
        ("DPMSolverMultistepScheduler", {}, {}, "is a DPMSolverMultistepScheduler"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {}, "invert_sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, {"solver": "heun"},
         "stochastic_sampling of the scheduler needs 'euler', not 'heun'"),
    ],
)  # fmt: skip
def test_another_scheduler_is_refused_by_name(pipe, scheduler, kind, settings, arguments, message):
    pipe.scheduler = getattr(diffusers, kind)(**settings)
    with pytest.raises(ValueError, match=message):
        paint(pipe, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": ["a kite", " "]}, "there is no prompt"),
        ({"prompt": ["a kite", 3]}, "there is no prompt"),
        ({"output_type": "numpy"}, "output_type is 'numpy'; give one of pil, np, pt, latent"),
        ({"output_type": None}, "output_type is None"),
        ({"height": 40}, "the size 32x40 is no multiple of 16"),
        ({"height": 0}, "the size 16x0 is no multiple of 16"),
        ({"prompt": ["a kite"] * 2, "latents": torch.zeros(1, 4, 8, 8)}, r"not \(2, 4, 8, 8\)"),
        ({"prompt": ["a kite"] * 2, "generator": [torch.Generator()]}, "1 generators .* 2 prompts"),
    ],
)
def test_what_cannot_be_painted_is_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a kite"} | arguments)


class Older(diffusers.QwenImageTransformer2DModel):
    """The transformer as diffusers 0.35 and 0.36 have it, which drop zero_cond_t when they load."""

    def __init__(self, num_layers=1, guidance_embeds=False):
        torch.nn.Module.__init__(self)


def test_an_older_diffusers_is_refused_by_name(pipe, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.36.0")
    parts, settings = pipe.components, {"max_text": 20}
    older = Older()
    older.register_to_config(num_layers=1, zero_cond_t=True, _name_or_path="x")
    message = "0.36.0 does not know zero_cond_t = True of the transformer .* diffusers>=0.37.0"
    with pytest.raises(ValueError, match=message):
        type(pipe)(**parts | {"transformer": older}, **settings)
    older.register_to_config(zero_cond_t=False, quantization_config={"bits": 4})
    pipeline.check_known("transformer", older)
    type(pipe)(**parts, **settings)


def test_the_card_names_the_versions():
    assert card.DIFFUSERS == pipeline.DIFFUSERS
