"""The report of a run, or of several side by side, as one HTML page."""
