"""Pictures as data and models share them: decoding, fitting, grids of patches, positions, roles."""
