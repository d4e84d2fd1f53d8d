"""The smallest network of each builder, for images of 3x32x32 in seven classes."""

from typing import Any

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_alexnet": {},
    "cifar_densenet": {"depth": 10, "growth_rate": 8},
    "cifar_preresnet": {"depth": 8, "width": 8},
    "cifar_resnet": {"depth": 8, "width": 8},
    "cifar_resnext": {"depth": 11, "cardinality": 2, "base_width": 32},
    "cifar_vgg": {"depth": 11},
    "cifar_wide_resnet": {"depth": 10, "widen_factor": 1, "dropout": 0.0},
    "imagenet_resnet": {"arch": "resnet18"},
}
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "frozen": FrozenBatchNorm2d}
NAMES_AND_NORMS = [(name, norm) for name in NETWORKS for norm in NORMS] + [("cifar_alexnet", "none")]


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
