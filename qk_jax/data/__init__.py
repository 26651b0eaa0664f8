"""Data of a training: examples, prompts, the batch plan and the pipeline of batches.

`importers` reads examples that were made elsewhere, `synthesis` makes them from cut-outs. What the
models do with a batch is not here.
"""
