"""The towers and their composition, as pure functions of one parameter tree.

Nothing here knows of stages, files or training.
"""
