"""qk_jax: Query-Kontext (arXiv 2509.26641) in JAX."""

__version__ = "0.1.0"
