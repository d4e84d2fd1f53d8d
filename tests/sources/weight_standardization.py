"""Classifiers of https://github.com/joe-siyuan-qiao/pytorch-classification: ``l_resnet50`` and the like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sources.residual import ResNet


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        fan_in = self.weight[0].numel()
        deviation = (centred.pow(2).sum(dim=(1, 2, 3), keepdim=True) / (fan_in - 1)).sqrt()
        weight = centred / (deviation + 1e-5)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


class Classifier(ResNet):
    """GroupNorm under the names ``bn1`` to ``bn3``."""

    def __init__(self, depth: int, groups: int = 1, num_classes: int = 1000) -> None:
        super().__init__(Conv2d, "bn", depth, groups=groups)
        self.fc = nn.Linear(2048, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.fc(super().forward(x)[-1].mean(dim=(2, 3)))


def save_published(network: nn.Module, path: Path) -> None:
    """As the released files are: the state dict alone, of a network in ``DataParallel``."""
    torch.save({f"module.{key}": tensor for key, tensor in network.state_dict().items()}, path)


def save_in_training(network: nn.Module, path: Path) -> None:
    """As ``imagenet.py`` writes ``checkpoint.pth.tar``."""
    weights = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    optimizer: dict[str, Any] = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict()
    torch.save({"epoch": 90, "state_dict": weights, "acc": 76.3, "best_acc": 76.3, "optimizer": optimizer}, path)
