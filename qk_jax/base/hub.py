"""Finding a model: a folder as it is, or a Hub id through the user's cache and login."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from qk_jax.base import buckets, files
from qk_jax.base.errors import InputError

log = logging.getLogger(__name__)
INDEX = "model_index.json"  # marks a pipeline folder of diffusers
# Folders of the parts within a pipeline, as Qwen-Image and our exports name them.
FOLDERS = {
    "vlm": "text_encoder",
    "mmdit": "transformer",
    "vae": "vae",
    "tokenizer": "tokenizer",
    "processor": "processor",
    "scheduler": "scheduler",
}
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")  # never pickles, nor other formats
_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_pipeline(folder: files.PathLike) -> bool:
    """Whether a folder is a pipeline of diffusers, with a part in each subfolder."""
    return (files.Path(folder) / INDEX).is_file()


def check(model: files.PathLike) -> None:
    """Raises InputError unless `model` exists on disk or has the form of a Hub id.

    The network is not asked.
    """
    if not files.Path(model).exists():
        _revision(model)


def model_folder(model: files.PathLike) -> files.Path:
    """The local folder (or file) of a whole model.

    Args:
      model: a path, or a Hub id `owner/name` with an optional `@revision`. What exists on disk is
        never looked for on the network.

    Raises:
      InputError: neither exists, or the Hub does not give it.
    """
    return _local(model, FOLDERS.values())


def component_folder(model: files.PathLike, part: str) -> files.Path:
    """The local folder of one part of a model, downloaded alone when `model` is a Hub id.

    Args:
      model: as in `model_folder`; a pipeline, or the part by itself.
      part: a key of FOLDERS.

    Raises:
      InputError: the model does not exist, or has no such part.
    """
    folder = _local(model, [FOLDERS[part]])
    inner = folder / FOLDERS[part]
    if not inner.is_dir() and is_pipeline(folder):
        raise InputError(f"{model} has no {FOLDERS[part]}/; give the folder of the {part} itself")
    return inner if inner.is_dir() else folder


def _local(model: files.PathLike, folders: Iterable[str]) -> files.Path:
    """What exists on disk as it is; else the Hub's model, of a pipeline these folders only."""
    buckets.check([str(model)])
    if files.Path(model).exists():
        return files.Path(model)
    found = _revision(model)
    if _index(model, found):
        patterns = [f"{folder}/{file}" for folder in folders for file in FILES]
        return _download(model, found, [INDEX, *patterns])
    return _download(model, found, list(FILES))


def _revision(model: files.PathLike) -> re.Match[str]:
    """The parts of a Hub id."""
    match = _ID.fullmatch(str(model))
    if match is None or ".." in str(model):
        raise InputError(
            f"{model} does not exist and is no Hub id; give a folder, or owner/name[@revision]"
        )
    return match


def _index(model: files.PathLike, found: re.Match[str]) -> bool:
    """Whether the Hub's model is a pipeline."""
    import huggingface_hub as hub  # slow to import, and not needed for folders
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hub.hf_hub_download(found["repo"], INDEX, revision=found["revision"])
    except LocalEntryNotFoundError:
        # Without network: what an earlier download has left says what it is.
        try:
            cached = hub.snapshot_download(
                found["repo"], revision=found["revision"], local_files_only=True
            )
        except Exception as error:
            raise _refused(model, error) from None
        return is_pipeline(cached)
    except EntryNotFoundError:
        return False
    except Exception as error:  # of the Hub, the network or the cache, without a common class
        raise _refused(model, error) from None
    return True


def _download(model: files.PathLike, found: re.Match[str], patterns: list[str]) -> files.Path:
    """The snapshot's folder in the user's cache, with the files of `patterns`."""
    import huggingface_hub as hub

    _announce(model, found, patterns)
    try:
        folder = hub.snapshot_download(
            found["repo"], revision=found["revision"], allow_patterns=patterns
        )
    except Exception as error:  # as in _index
        raise _refused(model, error) from None
    return files.Path(folder)


def _announce(model: files.PathLike, found: re.Match[str], patterns: list[str]) -> None:
    """Logs what is about to be downloaded; nothing where all of it is in the cache."""
    import huggingface_hub as hub

    try:
        wanted = hub.snapshot_download(
            found["repo"], revision=found["revision"], allow_patterns=patterns, dry_run=True
        )
    except Exception:  # without network: what the cache lacks is an error of the download itself
        return
    sizes = [file.file_size or 0 for file in wanted if file.will_download]
    if sizes:
        size, count = sum(sizes) / 1e9, len(sizes)
        log.info("downloading %s: %.2f GB in %d files, into the Hub's cache", model, size, count)


def _refused(model: files.PathLike, error: Exception) -> InputError:
    """One line from the Hub's own, which run over several."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return InputError(
        f"{model} does not exist here, and the Hub does not give it ({first.strip()[:200]}); check "
        "the name, the network, and `hf auth login` for gated models"
    )
