"""What a compiled program costs on a TPU slice: the slices, and the walk over scheduled HLO.

No other room reads HLO.
"""
