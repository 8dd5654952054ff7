"""How good a model is: perplexity, tasks, intervals, and the errors inside a layer."""
