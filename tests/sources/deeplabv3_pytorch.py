"""DeepLabv3 of https://github.com/chenxi116/DeepLabv3.pytorch with ``--groups 32 --weight_std``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sources.residual import ResNet


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, True).mean(2, True).mean(3, True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


class ASPP(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.aspp1 = Conv2d(2048, 256, 1, bias=False)
        for index, rate in ((2, 6), (3, 12), (4, 18)):
            self.add_module(f"aspp{index}", Conv2d(2048, 256, 3, dilation=rate, padding=rate, bias=False))
        self.aspp5 = Conv2d(2048, 256, 1, bias=False)
        for index in range(1, 6):
            self.add_module(f"aspp{index}_bn", nn.GroupNorm(32, 256))
        self.conv2 = Conv2d(5 * 256, 256, 1, bias=False)
        self.bn2 = nn.GroupNorm(32, 256)
        self.conv3 = nn.Conv2d(256, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for index in range(1, 6):
            seen = x if index < 5 else x.mean(dim=(2, 3), keepdim=True)
            y = self.get_submodule(f"aspp{index}")(seen)
            y = F.relu(self.get_submodule(f"aspp{index}_bn")(y))
            branches.append(y.expand(-1, -1, *x.shape[2:]))
        return self.conv3(F.relu(self.bn2(self.conv2(torch.cat(branches, 1)))))


class DeepLab(ResNet):
    """ResNet-101 at stride 16; scores of every pixel."""

    def __init__(self, num_classes: int = 21) -> None:
        super().__init__(Conv2d, "bn", 101, dilated=True)
        self.aspp = ASPP(num_classes)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        scores = self.aspp(super().forward(x)[-1])
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=True)


def save(network: nn.Module, path: Path) -> None:
    """As ``main.py`` writes ``deeplab_resnet101_pascal_v3_NAME_epoch50.pth``."""
    weights = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.007, momentum=0.9).state_dict()
    torch.save({"epoch": 50, "state_dict": weights, "optimizer": optimizer}, path)
