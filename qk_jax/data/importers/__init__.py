"""Examples that were made elsewhere: a file for each format, and the registry of all formats."""
