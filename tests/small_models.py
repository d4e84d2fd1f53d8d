"""Convolutions of every kind, and models of a few of them whose order of execution is spelled out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ws_algorithm.parametrization import register_weight_standardizer
from ws_algorithm.selection import ConvolutionChoice, Rules, select_convolutions


class Net(nn.Module):
    """Calls the layers of the given names one after the other, in `order`."""

    def __init__(self, layers: dict[str, nn.Module], order: list[str], call: Callable | None = None) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.order = order
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.call(self.get_submodule(name), x)
        return x


def conv(cls: Any = nn.Conv2d) -> Any:
    return cls(2, 2, 3, padding=1)


def defined_in_reverse(call: Callable | None = None) -> Any:
    return Net({"head": conv(), "body": conv(), "stem": conv()}, ["stem", "body", "head"], call)


class OnesConv(nn.Conv2d):
    """A user's layer with an initialization of its own, in all the ways that people write one."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.uniform_(self.weight, 1, 2)
        with torch.no_grad():
            self.weight.floor_()
        self.weight.data.mul_(3)


KINDS: dict[str, Callable[[], Any]] = {
    "Conv1d": lambda: nn.Conv1d(4, 6, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "Conv3d": lambda: nn.Conv3d(4, 6, 3),
    "no bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "grouped, padded": lambda: nn.Conv2d(4, 6, (3, 1), groups=2, stride=2, padding=2, padding_mode="circular"),
    "subclass": lambda: OnesConv(4, 6, 3),
}


def standardized(build: Callable[[], Any] = KINDS["Conv2d"]) -> Any:
    conv = build()
    register_weight_standardizer(conv)
    return conv


def put_a_class_in_front(conv: nn.Module) -> None:
    """What ``torch.distributed.fsdp.fully_shard`` does to a module."""
    mixin = type("Mixin", (), {})
    conv.__class__ = type(f"FSDP{type(conv).__name__}", (mixin, type(conv)), {})


def choose(model: nn.Module, n_last_layers_ignore: int = 0) -> tuple[ConvolutionChoice, ...]:
    return select_convolutions(model, Rules(n_last_layers_ignore)).choices


def left_out(model: nn.Module, n_last_layers_ignore: int) -> list[str]:
    choices = choose(model, n_last_layers_ignore)
    return [c.name for c in choices if c.skipped_because == f"n_last_layers_ignore={n_last_layers_ignore}"]
