"""A stage on a TPU slice: settings, what is checked, and the two routes, TPU VM and GKE."""
