"""Pictures as data and models share them: grids of patches and M-RoPE positions, fitting, roles."""
