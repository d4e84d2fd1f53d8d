"""ResNets with torchvision's names: the authors' classifiers, mmdetection's backbones, Composer's checkpoints."""

from __future__ import annotations

from ws_algorithm.checkpoints.sources import (
    IMAGENET,
    Renamed,
    StateDict,
    body_rules,
    rename,
    without_prefix,
)

_RAW = ".parametrizations.weight.original"


def from_weight_standardization(state_dict: StateDict) -> Renamed:
    """``R-50-GN-WS.pth.tar`` and the like, and what ``imagenet.py`` of pytorch-classification writes."""
    rules = [*body_rules("", ""), (r"fc\.(weight|bias)", r"fc.\1")]
    return rename(without_prefix(state_dict, "module."), rules, "paper", IMAGENET)


def from_mmdetection_backbone(state_dict: StateDict) -> Renamed:
    """``open-mmlab://jhu/resnet50_gn_ws`` and the like: norms under one of two names, with or without a classifier."""
    named = without_prefix(without_prefix(state_dict, "module."), "backbone.")
    rules = [*body_rules("", ""), (r"fc\.(weight|bias)", r"fc.\1")]
    return rename(named, rules, "paper", IMAGENET, may_lack=("fc.",))


def from_composer(state_dict: StateDict) -> Renamed:
    """A model of torchvision under Composer's own ``WeightStandardization``."""
    named = without_prefix(without_prefix(state_dict, "module."), "module.")  # ComposerClassifier, in DDP
    rules = [
        (r"(.*)\.parametrizations\.weight\.original", r"\1.weight"),
        (r"(?!.*parametrizations)(.*)", r"\1"),
    ]
    include = tuple(name.removesuffix(_RAW) for name in named if name.endswith(_RAW))
    return rename(named, rules, "composer", IMAGENET, with_batch_norm=True, include=include)


def is_residual(names: set[str]) -> bool:
    """Whether names, without prefixes, are those of a ResNet with GroupNorm."""
    norms = {"bn1.weight", "gn1.weight"} & names
    return bool(norms) and {"conv1.weight", "layer1.0.conv1.weight"} <= names and "bn1.running_mean" not in names
