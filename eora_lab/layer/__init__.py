"""The compressed layer: packed weight, low-rank path, and who multiplies."""
