from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import MultiScaleRoIAlign, box_iou
from torchvision.ops import roi_align as annotated_roi_align

from ws_algorithm.recipes.roi_heads import (
    BestProposalMatcher,
    BoxPredictor,
    LevelRoIAlign,
    MaskPredictor,
    RegionHeads,
)

SIZE = 128
roi_align: Any = annotated_roi_align  # type checkers take it for a text


def features(channels: int = 2) -> dict[str, Tensor]:
    return {str(level): torch.randn(2, channels, SIZE // s, SIZE // s) for level, s in enumerate((4, 8, 16, 32))}


def boxes(*corners: list[float]) -> Tensor:
    return torch.tensor(corners).reshape(-1, 4)


# areas of one pixel to all of the image, in both images
BOXES = [boxes([3.0, 5.0, 4.0, 6.0], [10.0, 20.0, 100.0, 60.5], [0.0, 0.0, 128.0, 128.0]), boxes([7, 9, 70.2, 77.7])]


def test_unaligned_pooling_is_torchvisions():
    theirs, ours = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2), LevelRoIAlign(7, 2, aligned=False)
    levels = features() | {"pool": torch.randn(2, 2, 2, 2)}

    expected = theirs(levels, BOXES, [(SIZE, SIZE)] * 2)

    assert torch.equal(ours(levels, BOXES, [(SIZE, SIZE)] * 2), expected)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_aligned_pooling_of_the_levels(sampling_ratio):
    big = boxes([0.0, 0.0, 224.0, 224.0])  # 224 pixels are for level 4, of stride 16
    small = boxes([8.0, 8.0, 40.0, 40.0])  # 32 for level 2, of stride 4
    levels = {str(level): torch.randn(1, 2, 256 // s, 256 // s) for level, s in enumerate((4, 8, 16, 32))}

    pooled = LevelRoIAlign(7, sampling_ratio, aligned=True)(levels, [torch.cat([big, small])], [(256, 256)])

    for own, box, level, stride in ((pooled[:1], big, "2", 16), (pooled[1:], small, "0", 4)):
        expected = roi_align(levels[level], [box], 7, 1 / stride, sampling_ratio, aligned=True)
        torch.testing.assert_close(own, expected)
        assert not torch.allclose(own, roi_align(levels[level], [box], 7, 1 / stride, sampling_ratio, aligned=False))


def test_aligned_pooling_of_a_plane_gives_the_values_at_the_centres_of_the_places():
    # features that are the x of their own centre: 2, 6, 10 and so on. A box from 16 to 44 has places 4 pixels wide
    centres = [s * (torch.arange(128 // s) + 0.5) for s in (4, 8, 16, 32)]
    levels = {str(level): own.expand(1, 1, len(own), -1) for level, own in enumerate(centres)}
    box = [boxes([16.0, 16.0, 44.0, 44.0])]

    aligned, not_aligned = (LevelRoIAlign(7, 2, own)(levels, box, [(128, 128)])[0, 0, 0] for own in (True, False))

    torch.testing.assert_close(aligned, 18.0 + 4 * torch.arange(7))
    torch.testing.assert_close(not_aligned, 20.0 + 4 * torch.arange(7))  # half a feature too far


def test_scales_do_not_depend_on_the_first_batch():
    # 40 pixels are padded to 64: 16 features over 40 is nearer to a half than to the quarter that it is
    levels = {str(level): torch.randn(1, 2, 64 // s, 64 // s) for level, s in enumerate((4, 8, 16, 32))}
    box = boxes([4.0, 4.0, 30.0, 30.0])

    pooled = LevelRoIAlign(7, 2, aligned=False)(levels, [box], [(40, 40)])

    torch.testing.assert_close(pooled, roi_align(levels["0"], [box], 7, 1 / 4, 2))


def test_no_region_at_all():
    pooled = LevelRoIAlign(7, 2, aligned=True)(features(), [boxes(), boxes()], [(SIZE, SIZE)] * 2)

    assert pooled.shape == (0, 2, 7, 7)


def test_the_best_proposal_of_an_object_becomes_its_own():
    objects = boxes([0, 0, 10, 10], [0, 0, 10, 9])
    proposals = boxes([0, 0, 10, 9.9], [0, 0, 10, 2])
    overlaps = box_iou(objects, torch.cat([proposals, objects]))
    assert overlaps[0, 0] > overlaps[1, 0] > 0.5  # the proposal is the best of both objects, and the first's

    usual = BestProposalMatcher.__mro__[1](0.5, 0.5)(overlaps)
    ours = BestProposalMatcher(0.5, 0.5)(overlaps)

    assert usual.tolist() == [0, -1, 0, 1]
    assert ours.tolist() == [1, -1, 0, 1]


def test_a_best_proposal_below_the_threshold_stays_background():
    objects, proposals = boxes([0, 0, 10, 10]), boxes([0, 0, 10, 4])

    assert BestProposalMatcher(0.5, 0.5)(box_iou(objects, torch.cat([proposals, objects]))).tolist() == [-1, 0]


def test_objects_without_proposals_match_themselves():
    objects = boxes([0, 0, 10, 10], [20, 20, 30, 30])

    assert BestProposalMatcher(0.5, 0.5)(box_iou(objects, objects)).tolist() == [0, 1]


class Recorded(nn.Module):
    """A layer that gives what it is told to."""

    def __init__(self, *outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *inputs: Any) -> Any:
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs


def region_heads(logits: Tensor, deltas: Tensor, masks: Tensor | None = None, **options: Any) -> RegionHeads:
    """Heads whose last layers give these outputs."""
    arguments: dict[str, Any] = {"box_beta": 1 / 9, "match_low_quality": False, "binary_mask_targets": False} | options
    if masks is not None:
        arguments |= {"mask_roi_pool": Recorded(logits), "mask_head": nn.Identity(), "mask_predictor": Recorded(masks)}
    return RegionHeads(
        box_roi_pool=Recorded(logits),
        box_head=nn.Identity(),
        box_predictor=Recorded(logits, deltas),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=100,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **arguments,
    )


OBJECT = boxes([10.0, 10.0, 30.0, 50.0])
# shifted by a tenth of its width and height, which the coder multiplies by 10, and far away
PROPOSALS = torch.cat([OBJECT + torch.tensor([2.0, 4.0, 2.0, 4.0]), boxes([60.0, 60.0, 80.0, 80.0])])


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0, 3.0])
def test_box_losses_are_over_all_sampled_regions(beta):
    target = {"boxes": OBJECT, "labels": torch.tensor([2])}
    logits = torch.randn(3, 4)
    heads = region_heads(logits, torch.zeros(3, 16), box_beta=beta)

    _, losses = heads({}, [PROPOSALS], [(SIZE, SIZE)], [target])

    # sampled: the two proposals and the object itself, which needs no correction; the first is 1 off to each side
    torch.testing.assert_close(losses["loss_classifier"], F.cross_entropy(logits, torch.tensor([2, 0, 2])))
    off = torch.tensor([1.0, 1.0, 0.0, 0.0])
    smooth = torch.where(off < beta, 0.5 * off**2 / max(beta, 1e-9), off - beta / 2)
    torch.testing.assert_close(losses["loss_box_reg"], smooth.sum() / 3)


def test_boxes_are_of_the_class_of_the_object():
    target = {"boxes": OBJECT, "labels": torch.tensor([2])}
    deltas = torch.full((3, 4, 4), 100.0)
    deltas[0, 2] = torch.tensor([-1.0, -1.0, 0.0, 0.0])  # back to the object
    deltas[2, 2] = 0.0

    _, losses = region_heads(torch.randn(3, 4), deltas.flatten(1))({}, [PROPOSALS], [(SIZE, SIZE)], [target])

    torch.testing.assert_close(losses["loss_box_reg"], torch.tensor(0.0), rtol=0, atol=1e-6)  # of 100 and 16 values


@pytest.mark.parametrize("binary", [False, True])
def test_masks_are_learned_where_a_region_is_positive(binary):
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    mask[0, 10:30, 10:30] = 1  # the upper half of the object
    target = {"boxes": OBJECT, "labels": torch.tensor([2]), "masks": mask}
    logits = torch.randn(2, 4, 28, 28)  # the first proposal and the object
    heads = region_heads(torch.randn(3, 4), torch.zeros(3, 16), logits, binary_mask_targets=binary)

    _, losses = heads({}, [PROPOSALS], [(SIZE, SIZE)], [target])

    regions = torch.cat([torch.zeros(2, 1), torch.cat([PROPOSALS[:1], OBJECT])], dim=1)
    cut = roi_align(mask[None].float(), regions, 28, sampling_ratio=0 if binary else -1, aligned=binary)[:, 0]
    wanted = (cut >= 0.5).float() if binary else cut
    assert bool(((wanted != 0) & (wanted != 1)).any()) != binary
    torch.testing.assert_close(losses["loss_mask"], F.binary_cross_entropy_with_logits(logits[:, 2], wanted))


def test_predictors_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [*BoxPredictor(8, 3)(torch.randn(2, 8)), MaskPredictor(8, 3)(torch.randn(2, 8, 4, 4))]

    assert {output.dtype for output in outputs} == {torch.float32}
