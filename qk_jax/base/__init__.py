"""What every other room may use: errors, files, command lines, named trees, the Hub, the process.

Nothing here knows of models, data or training.
"""
