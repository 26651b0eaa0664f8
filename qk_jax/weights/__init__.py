"""Other people's files, read and written: one mapping table per model serves both directions.

Safetensors folders of transformers and diffusers, their config.json, LoRA files. Whole pipelines
of a trained model are written in `export`.
"""
