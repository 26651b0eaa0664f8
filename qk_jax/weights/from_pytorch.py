"""Public weights -> a folder of ours: a model, a whole pipeline, or a LoRA file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from qk_jax.base import files, hub
from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.models import vae
from qk_jax.weights import imported, lora_files
from qk_jax.weights.read import CONFIGS, Part, mmdit_shapes, open_part, read
from qk_jax.weights.safetensors import TensorFolder

PARTS = ("vlm", "mmdit", "vae")
TOKENIZER = ("tokenizer*.json", "vocab.json", "merges.txt", "chat_template*", "preprocessor*.json")
KINDS = {
    "qwen2_5_vl": "vlm",
    "QwenImageTransformer2DModel": "mmdit",
    "AutoencoderKL": "vae",
    "AutoencoderKLQwenImage": "vae",
}


def parts_of(folder: files.Path) -> dict[str, files.Path]:
    """{part: its folder} of a model folder or a pipeline.

    Raises:
      InputError: a kind of model that is not known here.
    """
    if hub.is_pipeline(folder):
        found = {part: folder / hub.FOLDERS[part] for part in PARTS}
        found = {part: place for part, place in found.items() if place.is_dir()}
        if not found:
            names = ", ".join(hub.FOLDERS[part] for part in PARTS)
            raise InputError(f"{folder} has none of {names}; download the whole pipeline")
        return found
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", config.get("model_type"))
    if kind not in KINDS:
        raise InputError(f"{folder} holds a {kind!r}; known are {', '.join(KINDS)}")
    return {KINDS[kind]: folder}


def is_lora(path: files.Path) -> bool:
    """Whether a path is a file of adapters, or a folder with nothing but one."""
    return path.is_file() or (
        not (path / "config.json").is_file()
        and not hub.is_pipeline(path)
        and len(list(path.glob("*.safetensors"))) == 1
    )


def convert(
    model: str,
    out: str,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    ignore: Iterable[str] = (),
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Imports `model` into the folder `out`.

    Args:
      model: a folder of a Qwen2.5-VL, a Qwen-Image transformer or an autoencoder; a pipeline of
        diffusers; a LoRA file for the transformer; or a Hub id of one of them.
      out: appears when all of it is complete.
      dtype: of the parameters; None keeps the files'.
      mesh: over which the parameters are read and written, each device its share; None streams
        them through this process, a layer at a time.
      ignore: regexes of tensors that may be left out.
      base: for a LoRA file, the transformer that it adapts.
      say: gets a line for each part.

    Raises:
      InputError: something is missing, broken, unknown or does not fit; nothing is left behind.
    """
    folder = hub.model_folder(model)
    if imported.is_import(folder):
        raise InputError(f"{model} is an import already; give the folder that it came from")
    if is_lora(folder):
        if base is None:
            raise InputError(f"{model} is a LoRA; name the transformer that it adapts with --base")
        config = read_json(hub.component_folder(base, "mmdit") / "config.json")
        shapes = mmdit_shapes(CONFIGS["mmdit"](config))
        adapter, rank = lora_files.import_lora(folder, shapes, dtype)
        flat = flatten_dict(adapter, sep="/")
        say(f"lora: rank {rank}, {len(flat) // 2} stacked linear layers")
        imported.write(out, {"lora": flat}, {"lora": {"rank": rank}}, model)
        return
    parts, configs, places = {}, {}, parts_of(folder)
    for part, place in places.items():
        found = open_part(part, place, dtype, ignore)
        say(_line(part, place, found))
        parts[part], configs[part] = found.flat, found.config
        if mesh is not None:
            parts[part] = flatten_dict(read(part, found, mesh), sep="/")
    files = _small(folder)
    if isinstance(configs.get("vae"), vae.QwenImageVAEConfig):
        place = places["vae"]
        files[imported.ORIGINAL] = [*place.glob("*.json"), *place.glob("*.safetensors")]
    configs = {part: config.to_hf() for part, config in configs.items()}
    imported.write(out, parts, configs, model, files)


def _small(folder: files.Path) -> dict[str, list[files.Path]]:
    """{folder: files} that go along as they are: a pipeline's, or a plain VLM's tokenizer."""
    if hub.is_pipeline(folder):
        names = imported.SMALL
        found = {name: [f for f in (folder / name).glob("*") if f.is_file()] for name in names}
        found["."] = [folder / hub.INDEX]
    else:
        found = {"tokenizer": [file for kind in TOKENIZER for file in sorted(folder.glob(kind))]}
    return {name: files for name, files in found.items() if files}


def _line(part: str, folder: files.Path, found: Part) -> str:
    """What is imported, and what is left out of it."""
    count = sum(leaf.size for leaf in found.flat.values())
    used = {name for leaf in found.flat.values() for name in getattr(leaf, "names", ())}
    left = sorted(set(TensorFolder(folder).shapes) - used)
    rest = f"; left out: {', '.join(left)}" if left else ""
    return f"{part}: {count:,} parameters in {len(found.flat)} leaves from {folder}{rest}"
