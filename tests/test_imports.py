"""What importing costs, told by the modules that come with it: a list holds on any machine."""

import json
import os
import subprocess
import sys

import pytest

# Slow to import and not needed to load a published model from its folder.
HEAVY = {
    "accelerate", "array_record", "beartype", "diffusers", "grain", "huggingface_hub", "matplotlib",
    "ml_collections", "optax", "orbax", "pandas", "peft", "PIL", "pyarrow", "safetensors", "scipy",
    "tensorboardX", "tensorflow", "tensorflow_datasets", "tensorstore", "tokenizers", "torch",
    "tqdm", "transformers", "wandb",
}  # fmt: skip


def loaded(statement: str) -> set[str]:
    """Names of all modules that are there after `statement` in a fresh process."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def among(modules: set[str], names: set[str]) -> set[str]:
    """Which of the packages `names` are loaded."""
    return names & {name.partition(".")[0] for name in modules}


def test_the_package_alone_imports_nothing():
    modules = loaded("import qk_jax; dir(qk_jax)")
    assert among(modules, HEAVY | {"absl", "etils", "flax", "jax", "numpy"}) == set()
    assert {name for name in modules if name.startswith("qk_jax")} == {"qk_jax"}


def test_loading_published_models_imports_jax_and_flax_alone():
    modules = loaded("from qk_jax import load_mmdit, load_vae, load_vlm")
    assert among(modules, HEAVY) == set()
    assert "jax.experimental.pallas" not in modules  # kernels for TPUs
    rooms = {".".join(name.split(".")[:2]) for name in modules if name.startswith("qk_jax.")}
    assert rooms <= {
        f"qk_jax.{room}"
        for room in ("api", "base", "diffusion", "models", "pictures", "sharding", "weights")
    }


MAINS = [
    "train", "sample", "convert", "evaluate", "app.__main__", "bench.__main__",
    "checkpoints.__main__", "data.__main__",
]  # fmt: skip


@pytest.mark.parametrize("main", MAINS)
def test_mains_import_what_their_verb_needs(main):
    unneeded = {"diffusers", "matplotlib", "peft", "tensorflow_datasets", "torch", "transformers"}
    assert among(loaded(f"import qk_jax.{main}"), unneeded) == set()


def test_no_command_looks_for_a_tpu_that_is_not_there():
    """libtpu, which the benchmarks compile with, prints its errors where there is none."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    code = "from qk_jax.base import runtime; runtime.skip_absent_tpu(); import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
