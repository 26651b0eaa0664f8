"""Flow matching and its sampler: time law, interpolation, schedule, solvers, guidance."""
