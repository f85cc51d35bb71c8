"""Sources of the Metal kernels, one operation a file. Imports nothing, not even MLX."""
