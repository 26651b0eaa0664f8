"""The compiler's own schedule of a TPU program: the one room that reads HLO.

Topologies of slices that need not be here, the HLO text, its walk, and the time of each op.
"""
