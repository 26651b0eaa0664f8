"""The trainer, read top to bottom in `loop`: start, step, gradients, evaluators, metrics, FLOPs.

Painting and checkpoints stand below it. What is trained is the stage's table (`experiment.stages`);
what is minimised is an objective (`objectives/`).
"""
