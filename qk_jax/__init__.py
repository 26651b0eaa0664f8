"""qk_jax: Query-Kontext (arXiv 2509.26641) in JAX.

`load_vlm`, `load_mmdit`, `load_vae` and `load` are those of `qk_jax.api`, which is imported when
one of them is first asked for: `import qk_jax` alone imports neither JAX nor transformers.
"""

from typing import Any

__version__ = "0.1.0"
_API = ("load", "load_mmdit", "load_vae", "load_vlm")


def __getattr__(name: str) -> Any:
    if name in _API:
        from qk_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
