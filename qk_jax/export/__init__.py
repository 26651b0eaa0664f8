"""A trained model as a folder for PyTorch: components, pipeline, card, and the proof of equality.

The files of single models are read and written in `weights`; `pipeline` and `kontext` are shipped
inside the folder and import torch, never JAX.
"""
