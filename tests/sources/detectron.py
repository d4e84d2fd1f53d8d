"""ResNets and Mask R-CNN of https://github.com/facebookresearch/Detectron, ``projects/GN``: blobs, not modules.

Caffe2 writes ``NAME_w`` and ``NAME_b``, and ``NAME_gn_s`` and ``NAME_gn_b`` of the GroupNorm behind it. There is no
Weight Standardization.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sources.legacy_pickle import write_like_python_2
from sources.pyramid import feature_pyramid
from sources.random_weights import fill_plain
from sources.residual import BLOCKS


def classifier_shapes(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every blob of ``R-50-GN.pkl`` or ``R-101-GN.pkl``."""
    yield from _body_shapes(depth)
    yield from (("pred_w", (1000, 2048)), ("pred_b", (1000,)))


def detector_shapes(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every blob of ``e2e_mask_rcnn_R-50-FPN_2x_gn`` or its twin with 101 layers."""
    yield from _body_shapes(depth)
    for level, (lateral, output) in enumerate(_pyramid_names(depth)):
        yield from _with_norm(lateral, 256, 256 * 2**level, 1)
        yield from _with_norm(output, 256, 256, 3)
    for index in range(1, 5):
        yield from _with_norm(f"head_conv{index}", 256, 256, 3)
        yield from _with_norm(f"_mask_fcn{index}", 256, 256, 3)
    biased = {
        "conv_rpn_fpn2": (256, 256, 3, 3),
        "rpn_cls_logits_fpn2": (3, 256, 1, 1),
        "rpn_bbox_pred_fpn2": (12, 256, 1, 1),
        "fc6": (1024, 256 * 7 * 7),
        "cls_score": (81, 1024),
        "bbox_pred": (324, 1024),
        "conv5_mask": (256, 256, 2, 2),
        "mask_fcn_logits": (81, 256, 1, 1),
    }
    for name, shape in biased.items():
        yield from ((f"{name}_w", shape), (f"{name}_b", shape[:1]))


def _body_shapes(depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _with_norm("conv1", 64, 3, 7)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            name = f"res{stage + 2}_{block}"
            if block == 0:
                yield from _with_norm(f"{name}_branch1", out, channels, 1)
            yield from _with_norm(f"{name}_branch2a", width, channels, 1)
            yield from _with_norm(f"{name}_branch2b", width, width, 3)
            yield from _with_norm(f"{name}_branch2c", out, width, 1)
            channels = out


def _with_norm(name: str, out: int, channels: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}_w", (out, channels, kernel, kernel)), (f"{name}_gn_s", (out,)), (f"{name}_gn_b", (out,)))


def _pyramid_names(depth: int) -> list[tuple[str, str]]:
    """Names of the lateral and the output convolution of P2 to P5, after the last block of each stage."""
    lasts = [f"res{stage + 2}_{blocks - 1}_sum" for stage, blocks in enumerate(BLOCKS[depth])]
    laterals = [f"fpn_inner_{last}_lateral" for last in lasts[:3]] + [f"fpn_inner_{lasts[3]}"]
    return list(zip(laterals, [f"fpn_{last}" for last in lasts], strict=True))


class Detectron:
    """The nets that Detectron builds from blobs; the background is the first row of scores, boxes and masks."""

    background_last = False
    masked = True

    def __init__(self, depth: int, *, detector: bool, seed: int = 5) -> None:
        self.depth = depth
        self.blobs: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (detector_shapes if detector else classifier_shapes)(depth):
            blob = self.blobs[name] = torch.empty(shape)
            if name.endswith("_w"):
                fill_plain(blob, generator)
            else:
                blob.uniform_(*((0.5, 1.5) if name.endswith("_s") else (-0.5, 0.5)), generator=generator)

    def double(self) -> Detectron:
        self.blobs = {name: blob.double() for name, blob in self.blobs.items()}
        return self

    def classify(self, images: Tensor) -> Tensor:
        return self._fc(self._body(images)[-1].mean(dim=(2, 3)), "pred")

    def features(self, images: Tensor) -> list[Tensor]:
        names = _pyramid_names(self.depth)
        laterals, outputs = ([lambda x, n=pair[kind]: self._conv_gn(x, n) for pair in names] for kind in (0, 1))
        return feature_pyramid(self._body(images), laterals, outputs)

    def proposals(self, level: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self._conv(level, "conv_rpn_fpn2"))
        return self._conv(hidden, "rpn_cls_logits_fpn2"), self._conv(hidden, "rpn_bbox_pred_fpn2")

    def boxes(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        for index in range(1, 5):
            regions = F.relu(self._conv_gn(regions, f"head_conv{index}"))
        hidden = F.relu(self._fc(regions.flatten(1), "fc6"))
        return self._fc(hidden, "cls_score"), self._fc(hidden, "bbox_pred")

    def masks(self, regions: Tensor) -> Tensor:
        for index in range(1, 5):
            regions = F.relu(self._conv_gn(regions, f"_mask_fcn{index}"))
        weight, bias = self.blobs["conv5_mask_w"], self.blobs["conv5_mask_b"]
        return self._conv(F.relu(F.conv_transpose2d(regions, weight, bias, stride=2)), "mask_fcn_logits")

    def _body(self, images: Tensor) -> list[Tensor]:
        x = F.relu(self._conv_gn(images, "conv1", stride=2))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        stages = []
        for stage, blocks in enumerate(BLOCKS[self.depth]):
            for block in range(blocks):
                name, stride = f"res{stage + 2}_{block}", 2 if stage and not block else 1
                y = F.relu(self._conv_gn(x, f"{name}_branch2a"))
                y = F.relu(self._conv_gn(y, f"{name}_branch2b", stride))
                y = self._conv_gn(y, f"{name}_branch2c")
                x = F.relu(y + (x if block else self._conv_gn(x, f"{name}_branch1", stride)))
            stages.append(x)
        return stages

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.blobs[f"{name}_w"]
        return F.conv2d(x, weight, self.blobs.get(f"{name}_b"), stride, padding=weight.shape[-1] // 2)

    def _conv_gn(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        scale, shift = self.blobs[f"{name}_gn_s"], self.blobs[f"{name}_gn_b"]
        return F.group_norm(self._conv(x, name, stride), 32, scale, shift, 1e-5)

    def _fc(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.blobs[f"{name}_w"], self.blobs[f"{name}_b"])


def save(network: Detectron, path: Path, *, momentum: bool = False, wrapped: bool = True) -> None:
    """As Detectron under Python 2 writes it: blobs alone, or with its settings in YAML; with or without momentum."""
    blobs = {name: blob.numpy() for name, blob in network.blobs.items()}
    if momentum:
        blobs |= {f"{name}_momentum": np.full_like(blob, 0.5) for name, blob in blobs.items()}
    content = {"blobs": blobs, "cfg": "MODEL: {TYPE: generalized_rcnn}\n"} if wrapped else blobs
    with path.open("wb") as file:
        write_like_python_2(content, file)
