"""What a layer's inputs are like: statistics, measured while hidden states walk through the decoder."""
