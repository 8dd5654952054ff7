"""Low-rank paths of a batch in which every text has its own, or none: one product with W^, then each text's path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from eora_lab.errors import EoraLabError


@dataclass(frozen=True)
class RowPaths:
    """paths: (A, B) of each path, of ranks that may differ. ids: the path of each text of the batch, -1: none."""

    paths: tuple[tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]], ...]
    ids: Int32[Tensor, " texts"]
    texts: tuple[Tensor, ...]  # of each path: the numbers of its texts

    @classmethod
    def of(cls, paths: Sequence[tuple[Tensor, Tensor]], ids: Sequence[int], like: Tensor) -> "RowPaths":
        """Of A (rank, in) and B (out, rank) of each path, in the dtype and on the device of the tensor `like` (*, *).

        ids: the path of each text, -1: none.
        """
        of_path = [[text for text, one in enumerate(ids) if one == path] for path in range(len(paths))]
        return cls(
            tuple((A.to(like), B.to(like)) for A, B in paths),
            torch.tensor(ids, dtype=torch.int32, device=like.device),
            tuple(torch.tensor(texts, dtype=torch.long, device=like.device) for texts in of_path),
        )

    def check(self, x: Float[Tensor, "..."]) -> None:
        """Raise EoraLabError unless x is (texts, tokens, in): only then is it known which rows are whose."""
        if x.dim() != 3 or len(x) != len(self.ids):
            raise EoraLabError(
                f"{len(self.ids)} texts have an adapter each, and a layer is handed {tuple(x.shape)}, which mixes them "
                "or is another batch: use one adapter at a time with this model"
            )

    def of_rows(self, x: Float[Tensor, "... in"]) -> Int32[Tensor, " rows"]:
        """The path of each row of x, its texts one after another. Raises EoraLabError as `check`."""
        self.check(x)
        return self.ids.repeat_interleave(x.shape[1], output_size=x.shape[0] * x.shape[1])

    def add(self, y: Float[Tensor, "... out"], x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """y with each text's path added. Raises EoraLabError as `check`."""
        self.check(x)
        for (A, B), texts in zip(self.paths, self.texts, strict=True):
            if len(A):
                y = y.index_add(0, texts, F.linear(F.linear(x[texts], A), B))
        return y
