"""Faster and Mask R-CNN of https://github.com/open-mmlab/mmdetection/tree/main/configs/gn+ws, versions 1 and 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sources.pyramid import feature_pyramid
from sources.residual import ResNet


class ConvWS2d(nn.Conv2d):
    """mmcv's: the unbiased deviation, with epsilon added to it."""

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        deviation, mean = torch.std_mean(rows, dim=1, correction=1, keepdim=True)
        weight = ((rows - mean) / (deviation + 1e-5)).view_as(self.weight)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


class ConvModule(nn.Module):
    def __init__(self, channels: int, kernel_size: int, *, activated: bool) -> None:
        super().__init__()
        self.conv = ConvWS2d(channels, 256, kernel_size, padding=kernel_size // 2, bias=False)
        self.gn = nn.GroupNorm(32, 256)
        self.activated = activated

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.conv(x))
        return F.relu(x) if self.activated else x


class Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(256 * 2**level, 1, activated=False) for level in range(4))
        self.fpn_convs = nn.ModuleList(ConvModule(256, 3, activated=False) for _ in range(4))

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        return feature_pyramid(stages, list(self.lateral_convs), list(self.fpn_convs))


class RPNHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(256, 256, 3, padding=1)
        self.rpn_cls = nn.Conv2d(256, 3, 1)
        self.rpn_reg = nn.Conv2d(256, 12, 1)


class BBoxHead(nn.Module):
    def __init__(self, score_rows: int, box_rows: int) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(1024, score_rows)
        self.fc_reg = nn.Linear(1024, 4 * box_rows)
        self.shared_convs = nn.ModuleList(ConvModule(256, 3, activated=True) for _ in range(4))
        self.shared_fcs = nn.ModuleList([nn.Linear(256 * 7 * 7, 1024)])


class FCNMaskHead(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(256, 3, activated=True) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(256, 256, 2, stride=2)
        self.conv_logits = nn.Conv2d(256, rows, 1)


class MMDetector(nn.Module):
    """Version 2 has 80 rows of boxes and masks and its background as the 81st row of scores; version 1 has 81 rows of
    each, the background's first. Of a class-agnostic head there is one row of boxes or masks.
    """

    def __init__(
        self,
        depth: int = 50,
        groups: int = 1,
        *,
        masks: bool = True,
        version: int = 2,
        agnostic_boxes: bool = False,
        agnostic_masks: bool = False,
    ) -> None:
        super().__init__()
        rows = 80 if version == 2 else 81
        self.backbone = ResNet(ConvWS2d, "gn", depth, groups=groups)
        self.neck = Neck()
        self.rpn_head = RPNHead()
        heads: dict[str, nn.Module] = {"bbox_head": BBoxHead(81, 1 if agnostic_boxes else rows)}
        if masks:
            heads["mask_head"] = FCNMaskHead(1 if agnostic_masks else rows)
        self.version, self.masked = version, masks
        holder = self if version == 1 else nn.Module()
        for name, head in heads.items():
            holder.add_module(name, head)
        if version == 2:
            self.roi_head = holder
        self.background_last = version == 2

    def _head(self, name: str) -> Any:
        return self.get_submodule(name if self.version == 1 else f"roi_head.{name}")

    def features(self, images: Tensor) -> list[Tensor]:
        return self.neck(self.backbone(images))

    def proposals(self, level: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.rpn_head.rpn_conv(level))
        return self.rpn_head.rpn_cls(hidden), self.rpn_head.rpn_reg(hidden)

    def boxes(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        head = self._head("bbox_head")
        for conv in head.shared_convs:
            regions = conv(regions)
        hidden = F.relu(head.shared_fcs[0](regions.flatten(1)))
        return head.fc_cls(hidden), head.fc_reg(hidden)

    def masks(self, regions: Tensor) -> Tensor:
        head = self._head("mask_head")
        for conv in head.convs:
            regions = conv(regions)
        return head.conv_logits(F.relu(head.upsample(regions)))


def save(network: MMDetector, path: Path) -> None:
    meta = {
        "mmdet_version": f"{network.version}.0.0",
        "config": "conv_cfg = dict(type='ConvWS')\nmodel = dict(type='MaskRCNN')",
        "CLASSES": ("person", "bicycle"),
        "epoch": 24,
        "iter": 175896,
        "time": "Wed Feb 26 12:00:00 2020",
    }
    torch.save({"meta": meta, "state_dict": network.state_dict()}, path)


def backbone(depth: int) -> ResNet:
    return ResNet(ConvWS2d, "gn", depth)


def save_backbone(network: nn.Module, norm: str, path: Path) -> None:
    """As ``open-mmlab://jhu/resnet50_gn_ws`` and the like, whose norms are ``gn1`` or ``bn1``."""
    torch.save({re.sub(r"\bgn([123])\.", rf"{norm}\1.", key): own for key, own in network.state_dict().items()}, path)
