"""What `benchmarks/gpu_suite.sh` runs on a machine with a GPU, one stage a module; `suite` runs them all.

The modules import only torch, Triton, numpy, numba and the project itself.
"""
