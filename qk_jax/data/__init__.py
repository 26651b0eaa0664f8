"""Records, tasks, buckets and the step-indexed pipeline."""
