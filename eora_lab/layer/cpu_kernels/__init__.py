"""The fused product on a CPU: packed weight, low-rank path and bias in one call."""

from eora_lab.layer.cpu_kernels.joined import FewRows
from eora_lab.layer.cpu_kernels.packed import PackedGrid, pack_dense, pack_grid, why_not_dense, why_not_packed
from eora_lab.layer.cpu_kernels.product import few_rows, many_rows

__all__ = [
    "FewRows",
    "PackedGrid",
    "few_rows",
    "many_rows",
    "pack_dense",
    "pack_grid",
    "why_not_dense",
    "why_not_packed",
]
