"""Texts, and the tokens cut out of them."""
