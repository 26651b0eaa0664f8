"""Checkpoints on disk: the store of steps, digests of their leaves, and the folder of a stage.

What a stage starts from is decided above, in `training.start`.
"""
