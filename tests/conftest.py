"""What holds for every test."""

import os

# An agent that enrols times its kernels first, which would delay every test that starts one;
# `tests/unit/test_kernel_benchmark.py` is about that.
os.environ.setdefault("AUTOTUNE_KERNEL_BENCHMARK", "false")
