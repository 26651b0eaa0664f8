"""Public weights, checked, as a safetensors folder in the published form.

A model, a whole pipeline or a LoRA file is read through the tables and written through them again,
a layer at a time: every naming becomes the Hub's, every tensor has the shape that its config.json
asks for, and every value is finite.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from qk_jax.base import files, hub, trees
from qk_jax.base.errors import InputError
from qk_jax.base.files import read_json
from qk_jax.weights import hub_configs, leaves, lora_files, read, write
from qk_jax.weights.safetensors import TensorFolder

PARTS = ("vlm", "mmdit", "vae")
SMALL = ("tokenizer", "processor", "scheduler")  # a pipeline's folders without weights
COPIED = (".json", ".txt", ".jinja")  # tokenizers, model_index.json
OWN = "QueryKontextPipeline"  # the class of an export's model_index.json


def parts_of(folder: files.Path) -> dict[str, files.Path]:
    """{part: its folder} of a model folder or a pipeline.

    Raises:
      InputError: a kind of model that is not known here, or a pipeline with other parts.
    """
    if hub.is_pipeline(folder):
        inside = {part: folder / hub.FOLDERS[part] for part in PARTS}
        found = {part: path for part, path in inside.items() if path.is_dir()}
        if not found:
            names = ", ".join(hub.FOLDERS[part] for part in PARTS)
            raise InputError(f"{folder} has none of {names}; download the whole pipeline")
        _check_whole(folder)
        return found
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", config.get("model_type"))
    if kind not in hub_configs.PARTS:
        known = ", ".join(hub_configs.PARTS)
        raise InputError(f"{folder} holds a {kind!r}; known are {known}")
    return {hub_configs.PARTS[kind]: folder}


def _check_whole(folder: files.Path) -> None:
    """Raises InputError for a pipeline that would lose a part, so that diffusers cannot load it."""
    index = read_json(folder / hub.INDEX)
    if OWN in str(index.get("_class_name")):
        raise InputError(
            f"{folder} is an export of to-pytorch, whose queries and connector (kontext/) "
            "from-pytorch does not read; use the checkpoint that it was exported from, or give one "
            f"of its parts, such as {folder / hub.FOLDERS['vlm']}"
        )
    parts = [name for name, kind in index.items() if isinstance(kind, list) and any(kind)]
    for name in (name for name in parts if name[0] != "_"):
        if name not in hub.FOLDERS.values():
            raise InputError(
                f"{folder} has the part {name}, which from-pytorch does not read; give the folders "
                "of the parts that you need, one by one"
            )
        if not (folder / name).is_dir():
            raise InputError(f"{folder} lacks {name}/, which its {hub.INDEX} names; download it")


def _check_ignored(ignore: Iterable[str], parts: Mapping[str, files.Path]) -> None:
    """Raises InputError for a regex that matches no tensor: it is misspelt."""
    names = {name for folder in parts.values() for name in TensorFolder(folder).shapes}
    for pattern in ignore:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise InputError(
                f"--ignore {pattern!r} is the whole name of no tensor, such as {min(names)}; "
                "correct it or drop it"
            )


def is_lora(path: files.Path) -> bool:
    """Whether a path is a file of adapters, or a folder with nothing but one."""
    if path.is_file():
        return True
    names = [file.name for file in path.iterdir()]
    if "config.json" in names or hub.INDEX in names:
        return False
    return len([name for name in names if name.endswith(".safetensors")]) == 1


def convert(
    model: str,
    out: str,
    *,
    dtype: Any = None,
    ignore: Collection[str] = (),
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes `model` into the folder `out`, a layer at a time.

    Args:
      model: a folder of a Qwen2.5-VL, a Qwen-Image transformer or an autoencoder; a pipeline of
        diffusers; a LoRA file for the transformer; or a Hub id of one of them.
      out: appears when all of it is complete. An earlier folder of the kind is replaced.
      dtype: of the parameters; None keeps the files'.
      ignore: regexes of tensors that may be left out.
      base: for a LoRA file, the transformer that it adapts.
      say: gets a line for each part.

    Raises:
      InputError: something is missing, broken, unknown or does not fit; nothing is left behind.
    """
    folder, dtype = hub.model_folder(model), leaves.float_dtype(dtype)
    read.refuse_old(folder)
    if files.absolute(out) == files.absolute(folder):
        raise InputError(f"{out} is the model itself; choose another folder to write")
    if is_lora(folder):
        if ignore:
            raise InputError(f"--ignore leaves nothing out of a LoRA, which {folder} is; drop it")
        _convert_lora(folder, out, dtype, base, say)
        return
    if base is not None:
        raise InputError(f"--base is for a LoRA, and {folder} is none; drop it")
    is_pipeline, parts = hub.is_pipeline(folder), parts_of(folder)
    if ignore:
        _check_ignored(ignore, parts)
    with files.fresh_folder(out, hub.INDEX if is_pipeline else "config.json") as fresh:
        for part, source in parts.items():
            found = read.open_part(part, source, dtype, ignore)
            say(_line(part, source, found))
            target = fresh / hub.FOLDERS[part] if is_pipeline else fresh
            params = trees.unflatten(found.flat)
            write.export_model(params, found.config, target, dtype, original=source)
            read.open_part(part, target)
        small = [folder / name for name in SMALL if is_pipeline and (folder / name).is_dir()]
        for source in {folder, *parts.values(), *small}:
            target = fresh / source.relative_to(folder)
            target.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                is_index = ".safetensors." in file.name
                if file.suffix in COPIED and not is_index and not (target / file.name).exists():
                    file.copy(target / file.name)


def _convert_lora(
    path: files.Path, out: str, dtype: Any, base: str | None, say: Callable[[str], None]
) -> None:
    if base is None:
        raise InputError(f"{path} is a LoRA; name the transformer that it adapts with --base")
    config = read_json(hub.component_folder(base, "mmdit") / "config.json")
    shapes = read.shapes(hub_configs.from_hf("mmdit", config))
    adapter, rank = lora_files.import_lora(path, shapes, dtype)
    say(f"lora: rank {rank}, {len(trees.flatten(adapter)) // 2} stacked linear layers")
    with files.fresh_folder(out, f"{write.LORA}.safetensors") as fresh:
        write.export_lora(adapter, 1.0, fresh)


def _line(part: str, folder: files.Path, found: read.Part) -> str:
    """What is read, and what is left out of it."""
    count = sum(leaf.size for leaf in found.flat.values())
    used = {name for leaf in found.flat.values() for name in leaf.names}
    kept = "time_conv"  # of videos: not among our leaves, but copied
    left = sorted(n for n in TensorFolder(folder).shapes.keys() - used if kept not in n)
    rest = f"; left out: {', '.join(left)}" if left else ""
    return f"{part}: {count:,} parameters in {len(found.flat)} leaves from {folder}{rest}"
