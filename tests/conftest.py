"""Every test runs on eight fake CPU devices, in float32 at full precision, without network."""

import os
import pathlib
import shutil

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
EIGHT = "--xla_force_host_platform_device_count=8"
# Eight devices share the cores: on a busy machine one may come to a collective more than the 40 s
# after the others for which XLA waits before it ends the process.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT} {PATIENT}"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402  (the flags above must be set before jax starts)

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import tests.shapes  # noqa: E402, F401
from tests import needs  # noqa: E402

# In the tests, and only there, shapes are checked as annotated. Before the rooms are imported.
jaxtyping.install_import_hook(
    ["qk_jax.models", "qk_jax.diffusion", "qk_jax.pictures", "qk_jax.training.objectives"],
    "tests.shapes.checked",
)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled():
    """Compiled functions are shared within a module and dropped after it, to bound the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for what a page does there."""
    sync_api = needs.module("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        needs.missing("chromium on PATH: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
