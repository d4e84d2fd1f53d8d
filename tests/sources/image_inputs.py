"""How the sources see an RGB image from 0 to 1."""

from __future__ import annotations

import torch
from torch import Tensor


def rgb_of_imagenet(image: Tensor) -> Tensor:
    return (image - _channels(0.485, 0.456, 0.406)) / _channels(0.229, 0.224, 0.225)


def bgr_of_detectron(image: Tensor) -> Tensor:
    blue_green_red = image[:, [2, 1, 0]] * 255
    return blue_green_red - _channels(102.9801, 115.9465, 122.7717)


def half_and_half(image: Tensor) -> Tensor:
    return (image - 0.5) / 0.5


def _channels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
