"""What Faster and Mask R-CNN do with each region of interest: class, box and mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper
from torchvision.ops.roi_align import roi_align

_LEVELS = ("0", "1", "2", "3")  # strides of 4, 8, 16 and 32 pixels: what P6 sees is for proposals alone
_STRIDES = (4, 8, 16, 32)


class LevelRoIAlign(MultiScaleRoIAlign):
    """RoIAlign at the level of the pyramid that fits the size of a region: level 4 at 224 pixels.

    Args:
        output_size: Height and width of the result, in places.
        sampling_ratio: Samples along each side of a place; 0 for as many as there are features.
        aligned: Whether the centre of a feature is half a feature from its corner.
    """

    def __init__(self, output_size: int, sampling_ratio: int, aligned: bool) -> None:
        super().__init__(list(_LEVELS), output_size, sampling_ratio)
        self.aligned = aligned
        # torchvision's guesses them from the first batch, wrongly if its images are much smaller than padded
        self.scales = [1 / stride for stride in _STRIDES]
        self.map_levels = LevelMapper(2, 5)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        assert self.map_levels is not None and self.scales is not None
        features = [x[level] for level in _LEVELS]
        images = [torch.full_like(own[:, :1], index) for index, own in enumerate(boxes)]
        regions = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
        levels = self.map_levels(boxes)
        result = features[0].new_zeros(len(regions), features[0].shape[1], *self.output_size)
        for level, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            own = torch.where(levels == level)[0]
            size, ratio = list(self.output_size), self.sampling_ratio
            aligned = roi_align(feature, regions[own], size, scale, ratio, self.aligned)  # pyright: ignore[reportCallIssue]
            result[own] = aligned.to(result.dtype)
        return result


class BestProposalMatcher(Matcher):
    """mmdetection's ``match_low_quality`` for regions: an object also gets the proposal that overlaps it most.

    That proposal may overlap another object even more, and would be that one's. As in mmdetection, the overlap must
    reach the threshold, and the objects that are among the proposals themselves, in the last columns, do not count.
    """

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        matches = super().__call__(match_quality_matrix)
        objects, columns = match_quality_matrix.shape
        proposals = match_quality_matrix[:, : columns - objects]
        if proposals.shape[1] == 0:
            return matches
        for index, (best, overlaps) in enumerate(zip(proposals.amax(dim=1), proposals, strict=True)):
            taken = torch.where((overlaps == best) & (best >= self.high_threshold))[0]
            matches[taken] = index
        return matches


class BoxPredictor(FastRCNNPredictor):
    """Classes from N(0, 0.01), boxes from N(0, 0.001), as in the references; outputs in float32 or better."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return _full_precision(logits), _full_precision(deltas)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's, with biases from zero as in the references and outputs in float32 or better."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, channels, num_classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        return _full_precision(super().forward(input))


class RegionHeads(RoIHeads):
    """torchvision's, with losses that can be those of the references.

    Args:
        box_beta: Where the smooth L1 loss of the boxes turns from a parabola into a line; 0 is L1.
        match_low_quality: Whether regions are matched by :class:`BestProposalMatcher`.
        binary_mask_targets: Whether the masks to learn are cut out by an aligned RoIAlign and made 0 or 1 at 0.5, as in
            mmdetection, and not the values between that RoIAlign gives.
        arguments: Those of torchvision's ``RoIHeads``.
    """

    def __init__(
        self, *, box_beta: float, match_low_quality: bool, binary_mask_targets: bool, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.box_beta, self.binary_mask_targets = box_beta, binary_mask_targets
        if match_low_quality:
            usual = self.proposal_matcher
            self.proposal_matcher = BestProposalMatcher(usual.high_threshold, usual.low_threshold)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        regions, matches, labels, box_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, regions, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        losses = self._box_losses(logits, deltas, torch.cat(labels), torch.cat(box_targets))
        if self.has_mask():
            assert targets is not None, "select_training_samples checks it"
            positive = [torch.where(own > 0)[0] for own in labels]
            objects = [own[chosen] for own, chosen in zip(matches, positive, strict=True)]
            regions = [own[chosen] for own, chosen in zip(regions, positive, strict=True)]
            losses["loss_mask"] = self._mask_loss(features, regions, objects, image_shapes, targets)
        return [], losses

    def _box_losses(self, logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor) -> dict[str, Tensor]:
        positive = torch.where(labels > 0)[0]
        own_class = deltas.view(len(labels), -1, 4)[positive, labels[positive]]
        box_loss = F.smooth_l1_loss(own_class, targets[positive], beta=self.box_beta, reduction="sum")
        return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss / len(labels)}

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        objects: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        pooled = self.mask_head(self.mask_roi_pool(features, regions, image_shapes))  # pyright: ignore
        logits = self.mask_predictor(pooled)  # pyright: ignore[reportOptionalCall]
        labels = torch.cat([target["labels"][own] for target, own in zip(targets, objects, strict=True)])
        if len(labels) == 0:
            return logits.sum() * 0
        wanted = [
            self._mask_targets(target["masks"], *own, size=logits.shape[-1])
            for target, *own in zip(targets, regions, objects, strict=True)
        ]
        own_class = logits[torch.arange(len(labels), device=labels.device), labels]
        return F.binary_cross_entropy_with_logits(own_class, torch.cat(wanted).to(own_class.dtype))

    def _mask_targets(self, masks: Tensor, regions: Tensor, objects: Tensor, *, size: int) -> Tensor:
        boxes = torch.cat([objects[:, None].to(regions), regions], dim=1)
        ratio = 0 if self.binary_mask_targets else -1
        masks, aligned = masks[:, None].to(regions), self.binary_mask_targets
        cut = roi_align(masks, boxes, [size, size], 1.0, ratio, aligned)[:, 0]  # pyright: ignore[reportCallIssue]
        return (cut >= 0.5).to(cut) if self.binary_mask_targets else cut


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
