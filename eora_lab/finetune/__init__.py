"""Training the low-rank path on top of frozen, packed weights."""
