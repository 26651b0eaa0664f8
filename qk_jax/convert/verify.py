"""Compares a checkpoint with its PyTorch export: every tensor, and what both compute and paint."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax import painting
from qk_jax.convert import tables, torch_folder, torch_import
from qk_jax.convert.safetensors_io import Path, TensorFolder, read_json
from qk_jax.convert.torch_export import spill
from qk_jax.errors import InputError

# What float32 sums in another order explain: relative to the largest value, and of 255.
TOLERANCE = 1e-4
PIXELS = 2
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


def load_pipeline(folder: Path) -> Any:
    """The exported pipeline, in float32, from the folder alone.

    Raises:
      InputError: PyTorch is not installed, or diffusers cannot load the folder.
    """
    try:
        import torch
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise InputError(f"{error.name} is not installed; pip install 'qk_jax[torch]'") from None
    path = str(pathlib.Path(folder).resolve())
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path, custom_pipeline=path, trust_remote_code=True, local_files_only=True
        )
    except Exception as error:  # of diffusers, transformers or the folder's own code
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"diffusers cannot load {folder}: {first}; export again") from error
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    return pipe


def tensors(painter: painting.Painter, folder: Path) -> Iterator[Line]:
    """The largest difference over all tensors of each component; 0 is expected."""
    config, params, folder = painter.config, painter.params, pathlib.Path(folder)
    glue = {name: params[name] for name in ("queries", "connector")}
    vlm_table = tables.vlm(config.vlm.tie_word_embeddings)
    vlm_shapes = torch_import.vlm_shapes(config.vlm)
    mmdit_shapes = torch_import.mmdit_shapes(config.mmdit)
    vae_table, vae_shapes = torch_import.vae_table(config.vae), torch_import.vae_shapes(config.vae)
    for name, table, tree, shapes in (
        ("text_encoder", vlm_table, params["vlm"], vlm_shapes),
        ("transformer", tables.mmdit(), params["mmdit"], mmdit_shapes),
        ("vae", vae_table, params["vae"], vae_shapes),
        ("kontext", tables.glue(), glue, torch_import.shapes_of(glue)),
    ):
        source, worst = TensorFolder(folder / name), 0.0
        for tensor, ours in spill(table, tree, shapes):
            if source.shapes.get(tensor) != ours.shape:
                found = source.shapes.get(tensor)
                raise InputError(f"{folder / name} has {tensor} of shape {found}, not {ours.shape}")
            theirs = source.read(tensor)
            ours = ours.astype(theirs.dtype).astype(np.float32)
            worst = max(worst, float(np.abs(ours - theirs.astype(np.float32)).max(initial=0)))
        yield Line(f"{name}: {len(source.shapes)} tensors", worst, 0.0)


def examples(painter: painting.Painter) -> dict[str, painting.Request]:
    """Fixed requests that reach every way in: words, a source, references."""
    rng = np.random.default_rng(0)
    side = painter.limits.reference_size
    pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(3)]
    found = {"text": painter.fit("a red kite"), "source": painter.fit("make it blue", pictures[0])}
    if painter.limits.max_references:
        references = pictures[1:][: painter.limits.max_references]
        found["references"] = painter.fit("both of them", None, references)
    return found


def outputs(painter: painting.Painter, pipe: Any) -> Iterator[Line]:
    """Differences of context, latents of a picture, and painted pictures, for each example."""
    import torch
    from PIL import Image

    settings = painting.Settings(steps=4)
    for name, request in examples(painter).items():
        batch = painter.rows([request])
        context, mask = painter.programs.context(painter.params, batch)
        with torch.no_grad():
            theirs = pipe.encode_context(request.prompt, request.pictures)
        yield _line(f"{name}: context", np.asarray(context)[np.asarray(mask)], theirs[0])
        if request.pictures:
            with torch.no_grad():
                theirs = pipe.encode_picture(request.pictures[0])
            ours = painter.programs.encode(painter.params, batch["conditions"][0])
            yield _line(f"{name}: latents", ours[0], theirs[0].permute(1, 2, 0))
        noise = painter.noise(request)
        (ours,) = painter.paint_with_noise([request], [noise], settings)
        theirs = pipe(
            request.prompt,
            source=None if request.source is None else Image.fromarray(request.source),
            references=[Image.fromarray(picture) for picture in request.references],
            height=request.size[0],
            width=request.size[1],
            num_inference_steps=settings.steps,
            guidance=settings.guidance,
            image_guidance=settings.image_guidance,
            solver=settings.solver,
            latents=torch.from_numpy(noise.copy()).permute(2, 0, 1)[None],
            output_type="np",
        ).images[0]
        worst = np.abs(ours.astype(np.int32) - theirs.astype(np.int32)).max()
        yield Line(f"{name}: painted picture, of 255", float(worst), PIXELS)


def _line(name: str, ours: Any, theirs: Any) -> Line:
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours, np.float32), theirs.numpy()
    return Line(name, float(np.abs(ours - theirs).max() / np.abs(ours).max()), TOLERANCE)


def _in_float32(painter: painting.Painter, dtype: str) -> painting.Painter:
    """The painter computing in float32, as PyTorch will, with weights rounded as the export's."""

    def rounded(leaf: Any) -> Any:
        return leaf.astype(jnp.dtype(dtype)).astype(jnp.float32)

    out = copy.copy(painter)
    out.params = jax.tree.map(rounded, painter.params)
    out.programs = painting.programs(painter.config, jnp.float32)
    return out


def verify(painter: painting.Painter, folder: Path, say: Callable[[str], None] = print) -> bool:
    """Prints the table of differences; True when all are tolerated.

    Args:
      painter: the checkpoint.
      folder: its export.
      say: gets each line of the table.

    Raises:
      InputError: the folder is no export of this model, or PyTorch is not installed.
    """
    folder = pathlib.Path(folder)
    if not (folder / torch_folder.INDEX).is_file():
        raise InputError(f"{folder} holds no {torch_folder.INDEX}; give a folder of to-pytorch")
    dtype = read_json(folder / "text_encoder" / "config.json").get("dtype", "float32")
    if dtype not in DTYPES:
        raise InputError(f"{folder} is in {dtype!r}; this reads {', '.join(DTYPES)}")
    index = read_json(folder / torch_folder.INDEX)
    for name, ours in torch_folder.settings(painter).items():
        if index.get(name) != ours:
            found = f"{name} = {index.get(name)!r}, the checkpoint {ours!r}"
            raise InputError(f"{folder} has {found}; export again")
    say(f"{'compared (weights in ' + dtype + ')':<44} {'difference':>12} {'tolerated':>10}")
    lines = []

    def compare(found: Iterable[Line]) -> None:
        for line in found:
            lines.append(line)
            mark = "" if line.is_good else "  <- too large"
            say(f"{line.name:<44} {line.difference:>12.3g} {line.tolerance:>10.3g}{mark}")

    compare(tensors(painter, folder))
    compare(outputs(_in_float32(painter, dtype), load_pipeline(folder)))
    return all(line.is_good for line in lines)
