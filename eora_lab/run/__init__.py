"""The pass over a model: what to do, doing it, and what it leaves behind."""
