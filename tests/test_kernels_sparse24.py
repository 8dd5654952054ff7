"""2:4 weights: packing, and the operator on the CPU."""

import pytest
import torch

from eora_lab.errors import EoraLabError
from eora_lab.triton_kernels.sparse24 import pack24, sparse24_linear, unpack24


def weight24(out_features: int, in_features: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Two of four kept, and in every eighth four perhaps fewer."""
    kept = torch.randn(out_features, in_features // 4, 4).argsort(-1) < 2
    kept[:, ::8] &= torch.randn(kept[:, ::8].shape) > 0
    return (torch.randn(out_features, in_features) * kept.flatten(1)).to(dtype)


@pytest.mark.parametrize("shape", [(3, 4), (129, 300), (128, 512)])
def test_packing_is_undone(shape):
    W = weight24(*shape)
    packed = pack24(W, torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))
    assert torch.equal(unpack24(packed), W)
    if shape == (128, 512):
        assert (packed.values.nbytes + packed.places.nbytes) * 8 == 9 * W.numel()


def operands(M=3, N=36, K=68, rank=5, dtype=torch.float16):
    W, A, B, b = weight24(N, K, dtype), torch.randn(rank, K) / 8, torch.randn(N, rank), torch.randn(N)
    packed = pack24(W, A, B, b, dtype)
    fields = packed.values, packed.places, packed.A, packed.Bt, packed.tiles, packed.bias, packed.out_features
    x = torch.randn(M, K).to(dtype)
    A, B, b = (t.to(dtype).double() for t in (A, B, b))
    return x, fields, x.double() @ W.double().T + x.double() @ A.T @ B.T + b


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("rows", [0, 3, 70])
def test_the_operator_agrees_with_float64(rows, dtype, tolerance):
    torch.manual_seed(0)
    x, fields, expected = operands(M=rows, dtype=dtype)
    y = sparse24_linear(x, *fields)
    assert y.shape == expected.shape
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


def test_the_operator_passes_torchs_own_checks():
    x, fields, _ = operands()
    torch.library.opcheck(torch.ops.eora_lab.sparse24_linear.default, (x.view(1, 3, -1), *fields))


def test_a_weight_that_is_not_2_to_4_is_refused():
    with pytest.raises(EoraLabError, match="more than two of four"):
        pack24(torch.ones(4, 8), torch.zeros(0, 8), torch.zeros(4, 0))


def test_float32_is_refused():
    with pytest.raises(EoraLabError, match="float16 or bfloat16"):
        pack24(torch.zeros(4, 8), torch.zeros(0, 8), torch.zeros(4, 0), dtype=torch.float32)
