"""PyTorch <-> qk_jax: one table per model, read in both directions."""
