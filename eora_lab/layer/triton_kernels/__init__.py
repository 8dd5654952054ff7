"""Fused kernels: y = x W^ᵀ + (x Aᵀ) Bᵀ + bias with W^ in 3 or 4 bits, read once. Importing this imports no Triton.

packing, repack   the kernel's layout, made once from a compressed layer
ptx, planes       codes to floating-point numbers, two weights in two instructions
down              the small first launch: x Aᵀ and sums of x
decode, epilogue  the kernel for few rows, also with a path a row or an expert a row
prefill           the kernels for many rows
configs, launch   block sizes and launches
op, backend, linear   one torch operator, where it runs, and a module around it
experts           many weights of which each row of x takes some
"""

from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.linear import FusedLinear
from eora_lab.layer.triton_kernels.packing import rows_at_once
from eora_lab.layer.triton_kernels.repack import FusedWeight, fused_rows, fused_weight, why_not_fused

__all__ = [
    "FusedLinear",
    "FusedWeight",
    "fused_rows",
    "fused_weight",
    "rows_at_once",
    "why_not_fused",
    "why_not_triton",
]
