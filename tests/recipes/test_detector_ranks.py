"""A detector in two processes with gloo, one image on each, beside one process with two micro-batches."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from .detector_ranks import train
from .runs import environment

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Weights]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "composer.cli", "-n", "2", "-m", "recipes.detector_ranks", str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_of_one_image_have_the_weights_of_one_with_two_micro_batches(ranks):
    start, one = train()

    assert {value.dtype for value in one.values()} == {torch.float64}
    assert sum("parametrizations" in name for name in one) == 69
    still = [name for name, value in one.items() if torch.equal(value, start[name])]
    assert still == []
    # Both take the mean of the same two gradients, summed in another order: float64 rounds at 1e-16, and 60 layers
    # and two steps multiply that. A detector whose second image did not count would be off by half of what moves
    for name, value in one.items():
        moved = (value - start[name]).abs().max().item()
        torch.testing.assert_close(ranks[0][name], value, rtol=0.0, atol=1e-8 * moved, msg=name)


def test_the_processes_agree(ranks):
    first, second = ranks

    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
