"""The CUDA C++ counterpart: `fused.cu` compiled by nvcc to a cubin, loaded through the driver with ctypes."""
