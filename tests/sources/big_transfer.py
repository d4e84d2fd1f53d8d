"""BiT's ResNetV2 of https://github.com/google-research/big_transfer, ``bit_pytorch``, and its files of arrays."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sources.residual import BLOCKS


class StdConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        variance = (self.weight - mean).pow(2).mean(dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


class PreActBottleneck(nn.Module):
    def __init__(self, channels: int, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.gn1 = nn.GroupNorm(32, channels)
        self.conv1 = StdConv2d(channels, width, 1, bias=False)
        self.gn2 = nn.GroupNorm(32, width)
        self.conv2 = StdConv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.gn3 = nn.GroupNorm(32, width)
        self.conv3 = StdConv2d(width, out, 1, bias=False)
        if channels != out:
            self.downsample = StdConv2d(channels, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(x))
        shortcut = self.downsample(y) if hasattr(self, "downsample") else x
        y = self.conv2(F.relu(self.gn2(self.conv1(y))))
        return self.conv3(F.relu(self.gn3(y))) + shortcut


class ResNetV2(nn.Module):
    """``BiT-M-R50x1``, or its twin with 101 layers."""

    def __init__(self, depth: int = 50, num_classes: int = 1000) -> None:
        super().__init__()
        self.root = nn.Sequential(OrderedDict(conv=StdConv2d(3, 64, 7, stride=2, padding=3, bias=False)))
        self.root.add_module("pad", nn.ConstantPad2d(1, 0))
        self.root.add_module("pool", nn.MaxPool2d(3, stride=2))
        self.body = nn.Sequential()
        channels = 64
        for stage, blocks in enumerate(BLOCKS[depth]):
            units = nn.Sequential()
            for unit in range(blocks):
                stride = 2 if stage and not unit else 1
                units.add_module(
                    f"unit{unit + 1:02}", PreActBottleneck(channels, 64 * 2**stage, 256 * 2**stage, stride)
                )
                channels = 256 * 2**stage
            self.body.add_module(f"block{stage + 1}", units)
        self.head = nn.Sequential(
            OrderedDict(
                gn=nn.GroupNorm(32, 2048),
                relu=nn.ReLU(),
                avg=nn.AdaptiveAvgPool2d(1),
                conv=nn.Conv2d(2048, num_classes, 1),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.root(x)))[..., 0, 0]


def save_arrays(network: ResNetV2, path: Path) -> None:
    """As ``BiT-M-R50x1.npz``: TensorFlow's names, kernels as height, width, in, out."""
    np.savez(path, **{_array_name(key): _array(tensor) for key, tensor in network.state_dict().items()})  # pyright: ignore


def save_fine_tuned(network: ResNetV2, path: Path) -> None:
    """As ``bit_pytorch/train.py`` writes ``bit.pth.tar``."""
    weights = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.003, momentum=0.9).state_dict()
    torch.save({"step": 500, "model": weights, "optim": optimizer}, path)


def _array_name(key: str) -> str:
    path, kind = key.rsplit(".", 1)
    norm = {"weight": "group_norm/gamma", "bias": "group_norm/beta"}[kind]
    if path == "root.conv":
        return "resnet/root_block/standardized_conv2d/kernel"
    if path == "head.gn":
        return f"resnet/{norm}"
    if path == "head.conv":
        return f"resnet/head/conv2d/{'kernel' if kind == 'weight' else 'bias'}"
    _, block, unit, layer = path.split(".")
    prefix = f"resnet/{block}/{unit}"
    if layer == "downsample":
        return f"{prefix}/a/proj/standardized_conv2d/kernel"
    letter = "abc"[int(layer[-1]) - 1]
    return f"{prefix}/{letter}/{norm if layer.startswith('gn') else 'standardized_conv2d/kernel'}"


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.permute(2, 3, 1, 0).numpy() if tensor.ndim == 4 else tensor.numpy()
