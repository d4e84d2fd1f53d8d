"""What all tests share.

Tolerances, one policy for every file:

- exact (``torch.equal``, ``is``) where sameness is promised: fold, removal, reload, reset, parameter objects;
- the defaults of ``torch.testing.assert_close`` for the dtype at hand everywhere else, against a float64 oracle or a
  formula written beside the assert;
- anything wider carries its reason in a comment at the assert.
"""

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import distributed
from torch._C._distributed_c10d import HashStore

SEED = 17

# Enough for tensors of a few elements, and threads that wait for a busy core take thirty times as long
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("repeatable")


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Networks and Trainers refer to themselves, and Python looks for those seldom: they would fill the memory."""
    before = resident_bytes()
    yield
    if resident_bytes() - before > 50e6:
        gc.collect()


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    if distributed.is_initialized():  # by a Trainer in a test before this one
        yield
        return
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
