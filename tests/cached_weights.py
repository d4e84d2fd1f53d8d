"""Standardized weights that are read without gradients, inside ``standardize_once`` and outside."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from gain_and_shift import gain_and_shift
from torch.testing import assert_close

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
contexts = pytest.mark.parametrize("context", [nullcontext, standardize_once], ids=["outside", "inside"])


def assert_right(conv: Any) -> None:
    """Twice: inside, the first may be computed, and the second cached."""
    formula, rescaling = conv.parametrizations["weight"][0].formula, gain_and_shift(conv)
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                expected = standardize_weight(raw_weight(conv), formula, **rescaling)
                assert_close(conv.weight, expected, rtol=1e-6, atol=1e-6)
