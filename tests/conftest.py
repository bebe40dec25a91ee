"""One thread for each process, and GPU tests only where there is a GPU."""

import os

# Set before torch is loaded, for subprocesses too: a child that is forked from a process whose
# OpenMP threads have worked hangs at its first parallel loop.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
# torch warns once in a process: with this a test that fails for it fails in any order.
torch.set_warn_always(True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
