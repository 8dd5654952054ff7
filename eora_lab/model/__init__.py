"""A language model: loaded, taken apart, made to write."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16", "float64"]  # that a model is held in
