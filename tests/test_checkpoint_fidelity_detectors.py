"""Every part of a converted detector computes what that part does in the code that wrote the checkpoint.

Compared are the feature pyramid, the proposals of every level, and scores, boxes and masks of regions. Label 0 of ours
is the background; label k + 1 is the k-th of the 80 classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_networks import (
    TOLERANCE,
    as_expected_by,
    converted_file,
    count_standardized,
    detector,
    loaded,
    relative_error,
)
from sources import detectron, maskrcnn_benchmark, mmdetection
from sources.image_inputs import bgr_of_detectron, rgb_of_imagenet
from sources.random_weights import random_network
from torch import Tensor

CLASSES = 80


@dataclass(frozen=True)
class Case:
    """A checkpoint, as its own code writes it, and what must come of it."""

    model: str
    source: str
    build: Callable[[], Any]
    save: Callable[[Any, Path], None]
    file: str
    sees: Callable[[Tensor], Tensor]
    formula: str | None
    keys: int  # of our network
    standardized: int


def _mmdetection(model: str, keys: int, standardized: int, **arguments: Any) -> Case:
    def build() -> Any:
        return random_network(lambda: mmdetection.MMDetector(masks=model.startswith("mask"), **arguments))

    save, sees = mmdetection.save, rgb_of_imagenet
    return Case(model, "mmdetection", build, save, "epoch_24.pth", sees, "paper", keys, standardized)


def _fork(model: str, keys: int, standardized: int, **arguments: Any) -> Case:
    def build() -> Any:
        return random_network(lambda: maskrcnn_benchmark.MaskRCNNBenchmark(masks=model.startswith("mask"), **arguments))

    save, sees = maskrcnn_benchmark.save, bgr_of_detectron
    return Case(model, "maskrcnn_benchmark", build, save, "model_final.pth", sees, "paper", keys, standardized)


def _detectron(depth: int, keys: int) -> Case:
    def save(network: Any, path: Path) -> None:
        detectron.save(network, path, momentum=depth == 50)

    def build() -> Any:
        return detectron.Detectron(depth, detector=True)

    model = f"mask_rcnn_resnet{depth}"
    return Case(model, "detectron", build, save, "model_final.pkl", bgr_of_detectron, None, keys, 0)


# Of torchvision's networks with group normalization: Mask R-CNN has 16 tensors more than Faster R-CNN (4 convolutions
# with a norm of two, and 2 layers with a bias) and 4 standardized convolutions more; 101 layers have 51 convolutions
# more than 50, and so 153 tensors
CASES = {
    "mmdetection 2, Mask R-50": _mmdetection("mask_rcnn_resnet50", 223, 69),
    "mmdetection 1, Mask R-50": _mmdetection("mask_rcnn_resnet50", 223, 69, version=1),
    "mmdetection 2, Faster R-50": _mmdetection("faster_rcnn_resnet50", 207, 65),
    "mmdetection 2, Faster R-101": _mmdetection("faster_rcnn_resnet101", 360, 116, depth=101),
    "mmdetection 2, class-agnostic": _mmdetection(
        "mask_rcnn_resnet50", 223, 69, agnostic_boxes=True, agnostic_masks=True
    ),
    "mmdetection 1, class-agnostic": _mmdetection(
        "mask_rcnn_resnet50", 223, 69, agnostic_boxes=True, agnostic_masks=True, version=1
    ),
    "mmdetection 2, Mask X-101": _mmdetection("mask_rcnn_resnext101_32x4d", 376, 120, depth=101, groups=32),
    "fork, Mask R-50": _fork("mask_rcnn_resnet50", 223, 69),
    "fork, class-agnostic": _fork("faster_rcnn_resnet50", 207, 65, agnostic_boxes=True),
    "fork, Faster X-101": _fork("faster_rcnn_resnext101_32x4d", 360, 116, depth=101, groups=32),
    "Detectron, Mask R-50": _detectron(50, 223),
    "Detectron, Mask R-101": _detectron(101, 376),
}
SLOW = {
    "mmdetection 2, Faster R-50",
    "mmdetection 2, Faster R-101",
    "mmdetection 1, class-agnostic",
    "fork, class-agnostic",
    "mmdetection 2, Mask X-101",
    "Detectron, Mask R-101",
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_a_detector(tmp_path, name):
    case = CASES[name]
    theirs = case.build()
    case.save(theirs, tmp_path / case.file)

    converted = converted_file(tmp_path / case.file, case.model)
    ours = loaded(lambda: detector(case.model, converted.options), converted)

    assert (converted.source, converted.formula) == (case.source, case.formula)
    assert len(converted.state_dict) == len(ours.state_dict()) == case.keys
    assert count_standardized(ours) == case.standardized
    theirs.double()
    generator = torch.Generator().manual_seed(7)
    shapes = ((1, 3, 64, 64), (2, 256, 7, 7), (1, 256, 14, 14))
    images, boxes, masks = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    levels = theirs.features(case.sees(images))
    _check_levels(list(ours.backbone(as_expected_by(converted, images)).values()), levels)
    _check_proposals(ours, theirs, levels)
    _check_boxes(ours, theirs, boxes)
    if theirs.masked:
        _check_masks(ours, theirs, masks)


def _check_levels(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for level, own in zip(ours, theirs, strict=True):
        assert relative_error(level, own) <= TOLERANCE


def _check_proposals(ours: Any, theirs: Any, levels: list[Tensor]) -> None:
    for index, outputs in enumerate(zip(*ours.rpn.head(levels), strict=True)):
        for output, expected in zip(outputs, theirs.proposals(levels[index]), strict=True):
            assert relative_error(output, expected) <= TOLERANCE


def _check_boxes(ours: Any, theirs: Any, regions: Tensor) -> None:
    scores, deltas = ours.roi_heads.box_predictor(ours.roi_heads.box_head(regions))
    expected_scores, expected_deltas = theirs.boxes(regions)
    first = 0 if theirs.background_last else 1
    background = expected_scores[:, -1 if theirs.background_last else 0]
    assert relative_error(scores[:, 1:], expected_scores[:, first : first + CLASSES]) <= TOLERANCE
    assert relative_error(scores[:, 0], background) <= TOLERANCE
    assert deltas.shape == (len(regions), 4 * (CLASSES + 1))
    expected = _of_classes(expected_deltas.unflatten(1, (-1, 4)), first)
    assert relative_error(deltas.unflatten(1, (-1, 4))[:, 1:], expected) <= TOLERANCE


def _check_masks(ours: Any, theirs: Any, regions: Tensor) -> None:
    logits = ours.roi_heads.mask_predictor(ours.roi_heads.mask_head(regions))
    expected = theirs.masks(regions)
    assert logits.shape[1] == CLASSES + 1
    assert relative_error(logits[:, 1:], _of_classes(expected, 0 if theirs.background_last else 1)) <= TOLERANCE


def _of_classes(outputs: Tensor, first: int) -> Tensor:
    """Outputs of the 80 classes; the last one of a class-agnostic head is that of them all."""
    if outputs.shape[1] in (1, 2):
        return outputs[:, -1:].expand(-1, CLASSES, *outputs.shape[2:])
    assert outputs.shape[1] == first + CLASSES
    return outputs[:, first:]
