"""Faster and Mask R-CNN of https://github.com/joe-siyuan-qiao/maskrcnn-benchmark, ``configs/gn_baselines``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sources.pyramid import feature_pyramid
from sources.residual import Stem, add_stages, stages_of


class Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(dim=1)[:, None, None, None] + 1e-5)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


def conv_with_gn(channels: int, kernel_size: int) -> nn.Sequential:
    conv = Conv2d(channels, 256, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(32, 256))


class Body(nn.Module):
    def __init__(self, depth: int, groups: int) -> None:
        super().__init__()
        self.stem = Stem(Conv2d, "bn")
        add_stages(self, Conv2d, "bn", depth, groups=groups)

    def forward(self, x: Tensor) -> list[Tensor]:
        return stages_of(self, self.stem(x))


class FPN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for level in range(4):
            self.add_module(f"fpn_inner{level + 1}", conv_with_gn(256 * 2**level, 1))
            self.add_module(f"fpn_layer{level + 1}", conv_with_gn(256, 3))

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        inner, layers = ([self.get_submodule(f"fpn_{kind}{i}") for i in range(1, 5)] for kind in ("inner", "layer"))
        return feature_pyramid(stages, inner, layers)


class RPN(nn.Module):
    """Anchors are buffers, and so in every checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor_generator = nn.Module()
        self.anchor_generator.cell_anchors = nn.Module()
        for level in range(5):
            self.anchor_generator.cell_anchors.register_buffer(str(level), torch.empty(3, 4))
        self.head = nn.Module()
        self.head.conv = nn.Conv2d(256, 256, 3, padding=1)
        self.head.cls_logits = nn.Conv2d(256, 3, 1)
        self.head.bbox_pred = nn.Conv2d(256, 12, 1)


class BoxHead(nn.Module):
    def __init__(self, box_rows: int) -> None:
        super().__init__()
        self.feature_extractor = nn.Module()
        convs = [layer for _ in range(4) for layer in (*conv_with_gn(256, 3), nn.ReLU())]
        self.feature_extractor.xconvs = nn.Sequential(*convs)
        self.feature_extractor.fc6 = nn.Linear(256 * 7 * 7, 1024)
        self.predictor = nn.Module()
        self.predictor.cls_score = nn.Linear(1024, 81)
        self.predictor.bbox_pred = nn.Linear(1024, 4 * box_rows)


class MaskHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Module()
        for index in range(1, 5):
            self.feature_extractor.add_module(f"mask_fcn{index}", conv_with_gn(256, 3))
        self.predictor = nn.Module()
        self.predictor.conv5_mask = nn.ConvTranspose2d(256, 256, 2, 2)
        self.predictor.mask_fcn_logits = nn.Conv2d(256, 81, 1)


class MaskRCNNBenchmark(nn.Module):
    """The background is the first row of scores, boxes and masks; class-agnostic boxes have it and one other row."""

    background_last = False

    def __init__(self, depth: int = 50, groups: int = 1, *, masks: bool = True, agnostic_boxes: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = Body(depth, groups)
        self.backbone.fpn = FPN()
        self.rpn = RPN()
        self.roi_heads = nn.Module()
        self.roi_heads.box = BoxHead(2 if agnostic_boxes else 81)
        self.masked = masks
        if masks:
            self.roi_heads.mask = MaskHead()

    def features(self, images: Tensor) -> list[Tensor]:
        return self.get_submodule("backbone.fpn")(self.get_submodule("backbone.body")(images))

    def proposals(self, level: Tensor) -> tuple[Tensor, Tensor]:
        conv, logits, deltas = (self.get_submodule(f"rpn.head.{n}") for n in ("conv", "cls_logits", "bbox_pred"))
        hidden = F.relu(conv(level))
        return logits(hidden), deltas(hidden)

    def boxes(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        names = ("feature_extractor.xconvs", "feature_extractor.fc6", "predictor.cls_score", "predictor.bbox_pred")
        xconvs, fc6, scores, deltas = (self.get_submodule(f"roi_heads.box.{name}") for name in names)
        hidden = F.relu(fc6(xconvs(regions).flatten(1)))
        return scores(hidden), deltas(hidden)

    def masks(self, regions: Tensor) -> Tensor:
        for index in range(1, 5):
            regions = F.relu(self.get_submodule(f"roi_heads.mask.feature_extractor.mask_fcn{index}")(regions))
        names = ("conv5_mask", "mask_fcn_logits")
        deconv, logits = (self.get_submodule(f"roi_heads.mask.predictor.{name}") for name in names)
        return logits(F.relu(deconv(regions)))


def save(network: nn.Module, path: Path) -> None:
    """As its ``Checkpointer`` writes it in distributed training."""
    weights = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9).state_dict()
    scheduler = {"milestones": (120000, 160000), "gamma": 0.1, "last_epoch": 180000, "base_lrs": [0.01]}
    torch.save({"model": weights, "optimizer": optimizer, "scheduler": scheduler, "iteration": 180000}, path)
