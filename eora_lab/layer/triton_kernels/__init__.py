"""Fused kernels: y = x W^ᵀ + (x Aᵀ) Bᵀ + bias with W^ in 3 or 4 bits, read once. Importing this imports no Triton.

repack            the kernel's layout, made once from a compressed layer
ptx, planes       codes to floating-point numbers, two weights in two instructions
decode, epilogue  the kernel for few rows
prefill           the kernels for many rows
configs, launch   block sizes and launches
op, backend, linear   one torch operator, where it runs, and a module around it
"""

from eora_lab.layer.triton_kernels.backend import why_not_triton
from eora_lab.layer.triton_kernels.linear import FusedLinear
from eora_lab.layer.triton_kernels.repack import FusedWeight, fused_weight, repack, why_not_fused

__all__ = [
    "FusedLinear",
    "FusedWeight",
    "fused_weight",
    "repack",
    "why_not_fused",
    "why_not_triton",
]
