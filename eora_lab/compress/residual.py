"""The error that compression makes of a weight: what every compensation starts from."""

from jaxtyping import Float
from torch import Tensor

from eora_lab.compress.storage import Compressed


def residual(weight: Float[Tensor, "out in"], compressed: Compressed) -> Float[Tensor, "out in"]:
    """R = W - W^ in float32, with W^ rounded to the dtype of W, as the matrix product of the model sees it."""
    return weight.float() - compressed.dense(weight.dtype).to(weight).float()
