"""Data of a training: examples, prompts, the batch plan and the pipeline of batches.

`importers` reads what was made elsewhere, `synthesis` makes the tasks from cut-outs.
"""
