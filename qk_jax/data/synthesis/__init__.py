"""The six tasks made from captioned cut-outs, so that the truth of every example is known."""
