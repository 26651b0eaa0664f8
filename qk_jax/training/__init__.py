"""Stages, state, optimizer, step, checkpoints and metrics."""
