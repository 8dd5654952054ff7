"""The kernel bench: timings beside their floors, tuning, what the compiler made, and a CUDA C++ counterpart."""
