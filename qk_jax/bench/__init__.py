"""What a config costs, what fits a TPU slice and how fast it would be, and comparisons.

Ahead-of-time compilation needs no accelerator; `schedule` reads what the compiler says.
"""
