"""Standardized weights that are held while no gradients are recorded."""

from typing import Any

import pytest
import torch
from gain_and_shift import gain_and_shift
from torch.testing import assert_close

from ws_algorithm import standardize_weight
from ws_algorithm.parametrization import raw_weight

modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def assert_right(conv: Any) -> None:
    """Twice: the first may be computed, the second held."""
    formula, rescaling = conv.parametrizations["weight"][0].formula, gain_and_shift(conv)
    for _ in range(2):
        with torch.no_grad():
            assert_close(conv.weight, standardize_weight(raw_weight(conv), formula, **rescaling), rtol=1e-6, atol=1e-6)
