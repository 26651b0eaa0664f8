"""qk_jax: Query-Kontext (arXiv 2509.26641) in JAX.

`load_vlm`, `load_mmdit`, `load_vae` and `load` are those of `qk_jax.api`, which is imported when
one of them is first asked for: `import qk_jax` alone imports neither JAX nor transformers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_API = {
    "load": "qk_jax.api.trained",
    "load_mmdit": "qk_jax.api.published",
    "load_vae": "qk_jax.api.published",
    "load_vlm": "qk_jax.api.published",
}


def __getattr__(name: str) -> Any:
    if name in _API:
        return getattr(importlib.import_module(_API[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
