"""Every way in which a weight can change: here the raw weight of convolution ``3`` of ``exact_twins.tiny``."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ws_algorithm.parametrization import raw_weight

RAW_KEY = "3.parametrizations.weight.original"


def other_values(model: Any) -> Tensor:
    """Values for the raw weight of convolution ``3``."""
    raw = raw_weight(model[3])
    generator = torch.Generator().manual_seed(1)
    return (0.3 * torch.randn(raw.shape, generator=generator, dtype=torch.float64) + 0.1).to(raw.dtype)


@torch.no_grad()
def scale(model: Any) -> None:
    raw_weight(model[3]).mul_(0.25)


@torch.no_grad()
def add(model: Any) -> None:
    raw_weight(model[3]).add_(other_values(model))


@torch.no_grad()
def set_one_element(model: Any) -> None:
    raw_weight(model[3])[1, 1, 1, 1] = 0.7


def load(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), RAW_KEY: other_values(model)})


def load_with_assign(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), RAW_KEY: other_values(model)}, assign=True)


def replace_parameter(model: Any) -> None:
    model[3].parametrizations.weight.original = nn.Parameter(other_values(model))


def reset(model: Any) -> None:
    torch.manual_seed(2)
    model[3].reset_parameters()


def initialize(model: Any) -> None:
    torch.manual_seed(2)
    nn.init.kaiming_normal_(raw_weight(model[3]))


def add_to_data(model: Any) -> None:
    raw_weight(model[3]).data.add_(other_values(model))


def replace_data(model: Any) -> None:
    raw_weight(model[3]).data = other_values(model)


def write_through_numpy(model: Any) -> None:
    raw_weight(model[3]).detach().numpy()[...] = other_values(model).numpy()


def swap(model: Any) -> None:
    """Twice the same values: the version counter moves, the values stay."""
    with torch.no_grad():
        raw_weight(model[3]).neg_().neg_()


def change_all(model: Any) -> None:
    torch.nn.utils.vector_to_parameters(
        0.5 * torch.nn.utils.parameters_to_vector(model.parameters()).detach() + 0.01, model.parameters()
    )


CHANGES: list[Callable[[Any], None]] = [
    scale,
    add,
    set_one_element,
    load,
    load_with_assign,
    replace_parameter,
    reset,
    initialize,
    add_to_data,
    replace_data,
    write_through_numpy,
    swap,
    change_all,
]
changes = pytest.mark.parametrize("change", CHANGES)

# Those that are noticed inside a scope: PyTorch counts them, or the weight comes to other memory
COUNTED = [change for change in CHANGES if change not in (add_to_data, write_through_numpy)]
counted_changes = pytest.mark.parametrize("change", COUNTED)
