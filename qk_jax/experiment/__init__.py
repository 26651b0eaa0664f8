"""An experiment before it runs: its config, the table of stages, and the `Plan` of a run.

Nothing here holds an array. What starts and trains stands above.
"""
