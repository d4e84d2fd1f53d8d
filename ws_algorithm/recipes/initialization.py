"""How the convolutions of the networks start."""

from __future__ import annotations

from torch import nn


def initialize_convolutions(network: nn.Module) -> None:
    """Draw every ``Conv2d`` weight anew from N(0, 2 / (k k C_out)) and set its bias, if it has one, to zero.

    k is the kernel size and C_out the number of output channels, of all groups together. This is
    ``kaiming_normal_`` with ``mode="fan_out"`` and the gain of ReLU.

    Source: He et al. 2015, https://arxiv.org/abs/1502.01852, in the backward direction.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
