"""Many runs: cells, grids, what they share, where results are kept, and the paper's tables."""
