"""DeepLabv3 of https://github.com/chenxi116/DeepLabv3.pytorch, with GroupNorm and standardization or with BatchNorm."""

from __future__ import annotations

from ws_algorithm.checkpoints.sources import (
    IMAGENET,
    PARTS_OF_NORM,
    Renamed,
    Rule,
    StateDict,
    body_rules,
    rename,
    without_prefix,
)

_HEAD = "classifier.0"


def from_deeplabv3_pytorch(state_dict: StateDict) -> Renamed:
    """Networks with GroupNorm were trained with standardization, those with BatchNorm without.

    The last layer, ``aspp.conv3``, follows the projection of the pooled features: torchvision has a 3x3 convolution
    with a norm between them, so that it becomes ``classifier.1`` of a head without that.
    """
    named = without_prefix(state_dict, "module.")
    formula = None if "bn1.running_mean" in named else "paper"
    return rename(named, _RULES, formula, IMAGENET, with_batch_norm=True)


_RULES: list[Rule] = [
    *body_rules("", "backbone."),
    *((rf"aspp\.aspp{place + 1}\.weight", f"{_HEAD}.convs.{place}.0.weight") for place in range(4)),
    *((rf"aspp\.aspp{place + 1}_bn\.({PARTS_OF_NORM})", rf"{_HEAD}.convs.{place}.1.\1") for place in range(4)),
    (r"aspp\.aspp5\.weight", f"{_HEAD}.convs.4.1.weight"),
    (rf"aspp\.aspp5_bn\.({PARTS_OF_NORM})", rf"{_HEAD}.convs.4.2.\1"),
    (r"aspp\.conv2\.weight", f"{_HEAD}.project.0.weight"),
    (rf"aspp\.bn2\.({PARTS_OF_NORM})", rf"{_HEAD}.project.1.\1"),
    (r"aspp\.conv3\.(weight|bias)", r"classifier.1.\1"),
]
