"""What hosts get: the wheel of this checkout with its constraints and scripts, in one folder."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import sys
import tempfile

from pods.settings import Settings
from pods.shell import Shell

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "qk_jax", "configs")
SCRIPTS = {
    "tpu_vm": ("tpu_vm/host.sh", "tpu_vm/qk-train.service"),
    "gke": ("gke/Dockerfile",),
}


def build(settings: Settings, shell: Shell) -> tuple[pathlib.Path, str]:
    """(folder, digest of what it was made from).

    Raises:
      CommandError: the wheel cannot be built.
    """
    if shell.dry:
        folder = pathlib.Path("build/pods") / settings.name
        shell.run("python", "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={folder}", "CHECKOUT")
        return folder, "DIGEST"
    folder = ROOT / "build" / "pods" / settings.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = ("constraints.txt", "pods/supervise.py", *SCRIPTS[settings.route])
    own = pathlib.Path(settings.config.partition(":")[0])  # a config file goes along
    for path in [*(ROOT / "launch" / name for name in names), *([own] if own.suffix else [])]:
        shutil.copy(path, folder / path.name)
    with tempfile.TemporaryDirectory() as clean:  # what older builds left in build/lib stays out
        for name in SOURCES:
            target, source = pathlib.Path(clean) / name, ROOT / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        digest = digest_of(pathlib.Path(clean), folder)
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
        shell.run(*pip, f"--wheel-dir={folder}", clean)
    return folder, digest


def digest_of(*folders: pathlib.Path) -> str:
    """Of names and contents; not of a wheel, which has the time in it."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]
