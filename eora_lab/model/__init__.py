"""A language model: loaded, taken apart, made to write."""
