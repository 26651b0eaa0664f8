"""Flow matching: the noise law, the loss and the samplers."""
