"""Weights that no mistake of a conversion could leave unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def random_network(build: Callable[[], nn.Module], seed: int = 5) -> nn.Module:
    """A network in evaluation with random weights, without the time that its own initialization would take."""
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            _fill(module, generator)
    return network


def _fill(module: nn.Module, generator: torch.Generator) -> None:
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is not None and weight.ndim == 1:
        weight.uniform_(0.5, 1.5, generator=generator)
    elif weight is not None:
        # The convolutions of these networks that are not torch's own are those that standardize their weight
        standardized = isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d
        (fill_raw if standardized else fill_plain)(weight, generator)
    if bias is not None:
        bias.uniform_(-0.5, 0.5, generator=generator)
    for buffer in module._buffers.values():
        if buffer is not None:
            buffer.uniform_(0.5, 1.5, generator=generator) if buffer.is_floating_point() else buffer.zero_()


def fill_raw(weight: Tensor, generator: torch.Generator) -> None:
    """Rows with means, and with deviations from 1e-5 to 1e-1: around every published epsilon, so that each formula
    makes another weight of them.
    """
    rows = (len(weight), *[1] * (weight.ndim - 1))
    deviation = 10 ** torch.empty(rows).uniform_(-5, -1, generator=generator)
    weight.uniform_(-(3**0.5), 3**0.5, generator=generator)  # deviation 1
    weight.add_(torch.empty(rows).uniform_(-1, 1, generator=generator)).mul_(deviation)


def fill_plain(weight: Tensor, generator: torch.Generator) -> None:
    """Keeps activations at about their size, whatever the fan-in."""
    bound = (6 / weight[0].numel()) ** 0.5
    weight.uniform_(-bound, bound, generator=generator)
