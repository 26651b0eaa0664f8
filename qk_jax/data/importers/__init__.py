"""Examples that were made elsewhere, one file a format, and the registry that picks one."""
