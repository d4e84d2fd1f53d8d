"""The region proposal network of Faster R-CNN on the five levels of a feature pyramid, and its anchors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

_STRIDES = (4, 8, 16, 32, 64)
_RATIOS = (0.5, 1.0, 2.0)


class LevelAnchors(AnchorGenerator):
    """Anchors of one size and three ratios of height to width at each place of a level, in float32 or better.

    Args:
        scale: Size of a level's anchors in its strides of 4, 8, 16, 32 and 64 pixels.
        rounded: Whether corners around the centre have whole pixels, as in torchvision and not in mmdetection.
        exact_strides: Whether anchors are 4 to 64 pixels apart, as in the references; if not, the padded size of the
            images over that of the level, rounded down, as in torchvision. Both are the same up to stride 32. At the
            next level, the padded height 800 has 13 places, 61 pixels apart in torchvision.
    """

    def __init__(self, scale: int, *, rounded: bool, exact_strides: bool) -> None:
        super().__init__(tuple((scale * stride,) for stride in _STRIDES), (_RATIOS,) * len(_STRIDES))
        self.exact_strides = exact_strides
        if not rounded:
            self.cell_anchors = [_centred_anchors(scale * stride) for stride in _STRIDES]
        self._cells = self.cell_anchors

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        first, sizes = feature_maps[0], [feature.shape[-2:] for feature in feature_maps]
        # torchvision's take the type of the features: bfloat16 counts in steps of 4 pixels beyond 512
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.cell_anchors = [cells.to(device=first.device, dtype=dtype) for cells in self._cells]
        strides = [self._stride(level, image_list, size) for level, size in enumerate(sizes)]
        anchors = torch.cat(self.grid_anchors(sizes, strides))  # pyright: ignore[reportArgumentType]
        return [anchors for _ in image_list.image_sizes]

    def _stride(self, level: int, image_list: ImageList, size: torch.Size) -> list[int]:
        if self.exact_strides:
            return [_STRIDES[level]] * 2
        return [padded // places for padded, places in zip(image_list.tensors.shape[-2:], size, strict=True)]


def _centred_anchors(size: int) -> Tensor:
    heights = size * torch.tensor(_RATIOS, device="cpu").sqrt()
    widths = size**2 / heights
    return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


class ProposalHead(RPNHead):
    """torchvision's, with outputs in float32 or better: they become boxes."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [_full_precision(level) for level in logits], [_full_precision(level) for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's: 0.7 and 0.3 as IoU of positive and negative anchors, half positive ones, NMS at 0.7.

    Args:
        in_channels: Channels of every level.
        anchors: Makes the anchors.
        batch_size_per_image: Anchors of each image that the losses are of.
        pre_nms_top_n: Proposals of each level before NMS, in ``"training"`` and ``"testing"``.
        post_nms_top_n: Proposals of each image after NMS, in ``"training"`` and ``"testing"``.
        box_beta: Where the smooth L1 loss of the boxes turns from a parabola into a line; 0 is L1.
    """

    def __init__(
        self,
        in_channels: int,
        anchors: LevelAnchors,
        *,
        batch_size_per_image: int,
        pre_nms_top_n: dict[str, int],
        post_nms_top_n: dict[str, int],
        box_beta: float,
    ) -> None:
        head = ProposalHead(in_channels, len(_RATIOS))
        super().__init__(anchors, head, 0.7, 0.3, batch_size_per_image, 0.5, pre_nms_top_n, post_nms_top_n, 0.7)
        self.box_beta = box_beta

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        targets = torch.cat(regression_targets)[positive]
        box_loss = F.smooth_l1_loss(pred_bbox_deltas[positive], targets, beta=self.box_beta, reduction="sum")
        logits = objectness.flatten()[sampled]
        objectness_loss = F.binary_cross_entropy_with_logits(logits, torch.cat(labels)[sampled].to(logits.dtype))
        return objectness_loss, box_loss / len(sampled)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
