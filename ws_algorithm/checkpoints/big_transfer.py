"""ResNetV2 of Big Transfer: as released, in https://github.com/google-research/big_transfer, and in timm."""

from __future__ import annotations

import re
from dataclasses import replace

from ws_algorithm.checkpoints.sources import HALF, Renamed, Rule, StateDict, rename, without_prefix
from ws_algorithm.formula import Formula

# timm's layers for these networks have another eps than its other StdConv2d
_TIMM = Formula(eps=1e-8, eps_inside_root=True, unbiased=False)
_CONVS = {"a": "1", "b": "2", "c": "3"}
_PARTS = {"gamma": "weight", "beta": "bias"}


def from_timm(state_dict: StateDict) -> Renamed:
    """timm's own names; nothing changes but that the names are checked."""
    renamed = rename(without_prefix(state_dict, "module."), [(r"(.*)", r"\1")], _TIMM, HALF)
    return replace(renamed, include=_standardized(renamed))


def from_big_transfer(state_dict: StateDict) -> Renamed:
    """``BiT-M-R50x1.npz`` and the like, whose kernels have their channels last, or the PyTorch model's state dict."""
    named = without_prefix(state_dict, "module.")
    renamed = rename(named, _RULES, "bit", HALF)
    for target, source in renamed.origin.items():
        if source.endswith("/kernel") and renamed.tensors[target].ndim == 4:
            renamed.tensors[target] = renamed.tensors[target].permute(3, 2, 0, 1).contiguous()
    return replace(renamed, include=_standardized(renamed))


def _standardized(renamed: Renamed) -> tuple[str, ...]:
    """All convolutions but the last layer: norms stand before them, so that what follows says nothing."""
    names = (name for name, tensor in renamed.tensors.items() if tensor.ndim == 4)
    return tuple(name.removesuffix(".weight") for name in names if not name.startswith("head."))


def _block(found: re.Match[str]) -> str:
    return f"stages.{int(found['stage']) - 1}.blocks.{int(found['unit']) - 1}"


_UNIT = r"(?:resnet/)?block(?P<stage>[1-4])/unit(?P<unit>\d+)/"
_TORCH_UNIT = r"body\.block(?P<stage>[1-4])\.unit(?P<unit>\d+)\."
_RULES: list[Rule] = [
    (r"(?:resnet/)?root_block/standardized_conv2d/kernel", "stem.conv.weight"),
    (_UNIT + r"a/proj/standardized_conv2d/kernel", lambda found: f"{_block(found)}.downsample.conv.weight"),
    (
        _UNIT + r"(?P<conv>[abc])/standardized_conv2d/kernel",
        lambda found: f"{_block(found)}.conv{_CONVS[found['conv']]}.weight",
    ),
    (
        _UNIT + r"(?P<conv>[abc])/group_norm/(?P<part>gamma|beta)",
        lambda found: f"{_block(found)}.norm{_CONVS[found['conv']]}.{_PARTS[found['part']]}",
    ),
    (r"(?:resnet/)?group_norm/(?P<part>gamma|beta)", lambda found: f"norm.{_PARTS[found['part']]}"),
    (r"(?:resnet/)?head/conv2d/kernel", "head.fc.weight"),
    (r"(?:resnet/)?head/conv2d/bias", "head.fc.bias"),
    (r"root\.conv\.weight", "stem.conv.weight"),
    (_TORCH_UNIT + r"downsample\.weight", lambda found: f"{_block(found)}.downsample.conv.weight"),
    (_TORCH_UNIT + r"conv(?P<conv>[123])\.weight", lambda found: f"{_block(found)}.conv{found['conv']}.weight"),
    (
        _TORCH_UNIT + r"gn(?P<conv>[123])\.(?P<part>weight|bias)",
        lambda found: f"{_block(found)}.norm{found['conv']}.{found['part']}",
    ),
    (r"head\.gn\.(weight|bias)", r"norm.\1"),
    (r"head\.conv\.(weight|bias)", r"head.fc.\1"),
]
