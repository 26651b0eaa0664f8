"""Compares a checkpoint with its PyTorch export: every tensor, and what both compute and paint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from qk_jax import painting
from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.checkpoints.run_folder import Loaded
from qk_jax.export import card
from qk_jax.export.folder import INDEX, Adapter, separate
from qk_jax.models import lora, mmdit, query_kontext
from qk_jax.weights import tables
from qk_jax.weights.read import shapes, shapes_of
from qk_jax.weights.safetensors import Tensor, TensorFolder
from qk_jax.weights.write import lora_tensors, torch_tensors

# What float32 sums in another order explain: relative to the largest value, and of 255.
TOLERANCE = 1e-4
PIXELS = 2
SIGMA = 0.6  # noise level at which one velocity is compared
DTYPES = ("float32", "bfloat16", "float16")


class Line(NamedTuple):
    """One line of the table: what was compared, the largest difference, what is tolerated."""

    name: str
    difference: float
    tolerance: float

    @property
    def is_good(self) -> bool:
        """Whether the difference is tolerated; NaN is not."""
        return self.difference <= self.tolerance


def load_pipeline(folder: files.PathLike) -> Any:
    """The exported pipeline, in float32, from the folder alone; a separate adapter is loaded.

    Raises:
      InputError: PyTorch is not installed, or diffusers cannot load the folder.
    """
    try:
        import torch
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'qk_jax[torch]'") from None
    try:
        with buckets.staged_folder(files.absolute(folder)) as here:
            path = str(here)
            pipe = DiffusionPipeline.from_pretrained(
                path, custom_pipeline=path, trust_remote_code=True, local_files_only=True
            )
            if (here / card.LORA_FILE).is_file():
                pipe.load_lora_weights(path)
    except Exception as error:  # of diffusers, transformers or the folder's own code
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"diffusers cannot load {folder}: {first}; export again") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    return pipe


def tensors(
    painter: painting.Painter, folder: files.PathLike, adapter: Adapter | None = None
) -> Iterator[Line]:
    """The largest difference over all tensors of each component; 0 is expected.

    Args:
      painter: the checkpoint.
      folder: its export.
      adapter: what the export has apart from the weights; None when it is merged.

    Raises:
      InputError: a tensor is missing or has another shape.
    """
    config, params, folder = painter.config, painter.params, files.Path(folder)
    glue = {name: params[name] for name in ("queries", "connector")}
    generator = params["mmdit"] if adapter is None else adapter.base
    for name, tree, its_config in (
        ("text_encoder", params["vlm"], config.vlm),
        ("transformer", generator, config.mmdit),
        ("vae", params["vae"], config.vae),
    ):
        table = tables.of(its_config)
        ours = torch_tensors(table, tree, shapes(its_config))
        yield _compared(name, TensorFolder(folder / name), table, ours)
    ours = torch_tensors(tables.glue(), glue, shapes_of(glue))
    yield _compared("kontext", TensorFolder(folder / "kontext"), tables.glue(), ours)
    if adapter is not None:
        ours = lora_tensors(adapter.weights, adapter.scale)
        source = TensorFolder(folder / card.LORA_FILE)
        yield _compared("adapter", source, tables.lora(), ours)


def _compared(
    name: str, source: TensorFolder, table: tables.Table, tensors: Mapping[str, Tensor]
) -> Line:
    """The largest difference between our tensors, in the file's dtype, and the file's."""
    worst = 0.0
    for tensor, lazy in tensors.items():
        ours = lazy.make()
        if source.shapes.get(tensor) != ours.shape:
            found = source.shapes.get(tensor)
            raise InputError(
                f"{source.path} has {tensor} of shape {found}, not {ours.shape}; export again"
            )
        theirs = source.read(tensor)
        target = table.locate(tensor)
        if target is not None and target.transform.taps:  # the others are for videos, and not ours
            ours, theirs = ours[:, :, -1], theirs[:, :, -1]
        ours = ours.astype(theirs.dtype).astype(np.float32)
        worst = max(worst, float(np.abs(ours - theirs.astype(np.float32)).max(initial=0)))
    return Line(f"{name}: {len(source.shapes)} tensors", worst, 0.0)


def examples(painter: painting.Painter) -> dict[str, painting.Request]:
    """Fixed requests that reach every way in: words, a source, references."""
    rng = np.random.default_rng(0)
    known = painter.limits.reference_sizes[0]
    sizes = (known[0], known[0], known[-1])
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    found = {"text": painter.fit("a red kite"), "source": painter.fit("make it blue", pictures[0])}
    if painter.limits.max_references:
        references = pictures[1:][: painter.limits.max_references]
        found["references"] = painter.fit("both of them", None, references)
    return found


@functools.lru_cache(maxsize=2)
def _probes(model: query_kontext.QueryKontext) -> tuple[Callable, Callable]:
    """Compiled `states` and `velocity` of a model, which painting has no programs for."""
    return jax.jit(model.states), jax.jit(model.velocity, static_argnames="grid")


def outputs(painter: painting.Painter, pipe: Any) -> Iterator[Line]:
    """Differences of what both compute for each example: the VLM's states, the context, latents
    of a picture, one velocity, a decoded and a painted picture."""
    for name, request in examples(painter).items():
        for line in _steps(painter, pipe, request):
            yield line._replace(name=f"{name}: {line.name}")


def _steps(painter: painting.Painter, pipe: Any, request: painting.Request) -> list[Line]:
    """The lines of one example, in the order of the computation."""
    import torch

    params, programs, batch = painter.params, painter.programs, painter.collate([request])
    states, velocity = _probes(programs.model)
    words, queries = states(params, {k: v for k, v in batch.items() if k != "roles"})
    context, mask = programs.context(params, batch)
    latents, noise = painter.latents(batch), painter.noise(request)
    start = jnp.asarray(noise)[None]
    grids = [(z.shape[1] // 2, z.shape[2] // 2) for z in (start, *latents)]
    tokens = mmdit.pack(start)
    found = velocity(
        params, tokens, jnp.full((1,), SIGMA), context, mask,
        grids[0], latents, batch["roles"], batch["condition_mask"],
    )  # fmt: skip
    decoded = programs.decode(params, start)
    settings = painting.Settings(steps=4)
    (painted,) = painter.paint([request], settings, [noise])

    with torch.no_grad():
        their_states = pipe.encode_states(request.prompt, request.pictures, request.roles)
        their_context = pipe.encode_context(request.prompt, request.pictures, request.roles)
        shown = [pipe.encode_picture(picture) for picture in request.pictures[: len(latents)]]
        their_velocity = pipe.velocity(
            torch.from_numpy(np.array(tokens)), SIGMA, their_context, shown,
            grids, request.roles[: len(latents)],
        )  # fmt: skip
        latent = torch.from_numpy(noise.copy()).permute(2, 0, 1)[None]
        their_picture = (pipe.decode_latents(latent)[0].permute(1, 2, 0) * 255).round()
    shown_words = np.asarray(mask)
    return [
        _line("VLM states", np.concatenate([words, queries], axis=1)[shown_words], their_states[0]),
        _line("context", np.asarray(context)[shown_words], their_context[0]),
        *(_line("latents", ours[0], theirs[0].permute(1, 2, 0))
          for ours, theirs in zip(latents, shown, strict=True)),
        _line("velocity", found[0], their_velocity[0]),
        _pixels("decoded picture", decoded[0], their_picture.numpy()),
        _pixels("painted picture", painted, paint(pipe, request, settings, noise)),
    ]  # fmt: skip


def paint(
    pipe: Any, request: painting.Request, settings: painting.Settings, noise: np.ndarray
) -> np.ndarray:
    """What the exported pipeline paints, uint8 [H, W, 3].

    Args:
      pipe: of `load_pipeline`.
      request: as the painter would paint it.
      settings: see request.
      noise: float32 [H / 8, W / 8, C].
    """
    import torch

    painted = pipe(
        request.prompt,
        source=None if request.source is None else Image.fromarray(request.source),
        references=[Image.fromarray(picture) for picture in request.references],
        height=request.size[0],
        width=request.size[1],
        num_inference_steps=settings.steps,
        **{name: value for name, value in vars(settings).items() if name != "steps"},
        latents=torch.from_numpy(noise.copy()).permute(2, 0, 1)[None],
    )
    return np.asarray(painted.images[0])


def _line(name: str, ours: Any, theirs: Any) -> Line:
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours, np.float32), theirs.numpy()
    return Line(name, float(np.abs(ours - theirs).max() / np.abs(ours).max()), TOLERANCE)


def _pixels(name: str, ours: Any, theirs: np.ndarray) -> Line:
    """The largest difference of two uint8 pictures."""
    worst = np.abs(np.asarray(ours, np.int32) - theirs.astype(np.int32)).max()
    return Line(f"{name}, of 255", float(worst), PIXELS)


def _in_float32(painter: painting.Painter, dtype: str, adapter: Adapter | None) -> painting.Painter:
    """The painter computing in float32, as PyTorch will, with weights rounded as the export's."""

    def rounded(leaf: Any) -> Any:
        return leaf.astype(jnp.dtype(dtype)).astype(jnp.float32)

    out = copy.copy(painter)
    out.params = jax.tree.map(rounded, painter.params)
    if adapter is not None:
        folded = lora.scaled(adapter.weights, adapter.scale)
        base, weights = jax.tree.map(rounded, (adapter.base, folded))
        out.params["mmdit"] = jax.jit(lora.merge)(base, weights, 1.0)
    if painter.programs.model.dtype != jnp.float32:
        out.programs = painting.programs(painter.config, jnp.float32)
    return out


def verify(loaded: Loaded, folder: files.PathLike, say: Callable[[str], None] = print) -> bool:
    """Prints the table of differences; True when all are tolerated.

    Args:
      loaded: the trained model.
      folder: its export.
      say: gets each line of the table.

    Raises:
      InputError: the folder is no export of this model, or PyTorch is not installed.
    """
    painter, folder = painting.of_loaded(loaded, batch=1), files.Path(folder)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds no {INDEX}; give a folder of to-pytorch")
    dtype = read_json(folder / "text_encoder" / "config.json").get("dtype", "float32")
    if dtype not in DTYPES:
        raise InputError(f"{folder} is in {dtype!r}; this reads {', '.join(DTYPES)}")
    index = read_json(folder / INDEX)
    for name, ours in card.settings(painter).items():
        if index.get(name) != ours:
            found = f"{name} = {index.get(name)!r}, the checkpoint {ours!r}"
            raise InputError(f"{folder} has {found}; export again")
    is_separate = (folder / card.LORA_FILE).is_file()
    adapter = separate(loaded) if is_separate else None
    say(f"{'compared (weights in ' + dtype + ')':<44} {'difference':>12} {'tolerated':>10}")
    lines = []

    def compare(found: Iterable[Line]) -> None:
        for line in found:
            lines.append(line)
            mark = "" if line.is_good else "  <- too large"
            say(f"{line.name:<44} {line.difference:>12.3g} {line.tolerance:>10.3g}{mark}")

    compare(tensors(painter, folder, adapter))
    compare(outputs(_in_float32(painter, dtype, adapter), load_pipeline(folder)))
    return all(line.is_good for line in lines)
