import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from ws_algorithm.recipes.region_proposals import LevelAnchors, ProposalHead, ProposalNetwork

RATIOS = (0.5, 1.0, 2.0)


def pyramid(height: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[ImageList, list[Tensor]]:
    """An empty image and its five levels: a stride of two takes the odd place too."""
    images, levels = ImageList(torch.empty(1, 3, height, width), [(height, width)]), []
    for stride in (4, 8, 16, 32):
        levels.append(torch.empty(1, 1, height // stride, width // stride, dtype=dtype))
    levels.append(levels[-1][..., ::2, ::2])
    return images, levels


def network(box_beta: float, sampled: int = 256) -> ProposalNetwork:
    anchors, counts = LevelAnchors(8, rounded=True, exact_strides=False), {"training": 8, "testing": 8}
    settings = {"batch_size_per_image": sampled, "pre_nms_top_n": counts, "post_nms_top_n": counts}
    return ProposalNetwork(4, anchors, box_beta=box_beta, **settings)


def test_rounded_anchors_are_torchvisions():
    theirs = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (RATIOS,) * 5)
    ours = LevelAnchors(8, rounded=True, exact_strides=False)
    images, levels = pyramid(96, 160)

    assert torch.equal(ours(images, levels)[0], theirs(images, levels)[0])
    assert ours.num_anchors_per_location() == theirs.num_anchors_per_location() == [3] * 5


def test_other_anchors_have_the_area_and_the_ratio_of_the_formula():
    images, levels = pyramid(64, 64)
    anchors = LevelAnchors(8, rounded=False, exact_strides=False)(images, levels)[0]

    # the first place of the first level: 32 x 32 pixels, and as much in the ratios of height to width 1:2 and 2:1
    root = math.sqrt(2)
    halves = [(16 * root, 16 / root), (16.0, 16.0), (16 / root, 16 * root)]
    expected = [[-width, -height, width, height] for width, height in halves]
    torch.testing.assert_close(anchors[:3], torch.tensor(expected))
    # as they are rounded in torchvision
    assert anchors[0].round().tolist() == [-23, -11, 23, 11]


@pytest.mark.parametrize(("exact", "stride"), [(False, 800 // 13), (True, 64)])
def test_anchors_of_the_last_level_are_61_or_64_pixels_apart(exact, stride):
    images, levels = pyramid(800, 64)
    last = LevelAnchors(8, rounded=True, exact_strides=exact)(images, levels)[0][-3 * 13 :]

    assert levels[-1].shape[-2:] == (13, 1)  # 800 / 32 is 25, and every second of 25
    assert last[3::3, 1].sub(last[:-3:3, 1]).unique().tolist() == [stride]


def test_anchors_of_half_precision_features_are_exact():
    full, half = pyramid(800, 1344), pyramid(800, 1344, torch.bfloat16)
    maker = LevelAnchors(8, rounded=False, exact_strides=True)

    assert torch.equal(maker(*half)[0], maker(*full)[0])
    assert torch.equal(maker(*half)[0], maker(*full)[0])  # and again
    assert maker(*half)[0].dtype == torch.float32


def test_outputs_are_float32_under_autocast():
    head = ProposalHead(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = head([torch.randn(1, 8, 4, 4)])

    assert logits[0].dtype == deltas[0].dtype == torch.float32


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_the_losses_are_means_over_the_sampled_anchors(beta):
    labels = [torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([0.0, -1.0, 1.0, 0.0])]  # -1 is left out
    deltas, targets = torch.randn(8, 4), torch.randn(8, 4)
    logits = torch.randn(8, 1)

    objectness_loss, box_loss = network(beta).compute_loss(logits, deltas, labels, list(targets.split(4)))

    sampled = [0, 1, 3, 4, 6, 7]
    probabilities, truth = logits.sigmoid().flatten()[sampled], torch.cat(labels)[sampled]
    expected = -(truth * probabilities.log() + (1 - truth) * (1 - probabilities).log()).mean()
    torch.testing.assert_close(objectness_loss, expected)
    errors = (deltas - targets)[[0, 6]].abs()
    smooth = torch.where(errors < beta, 0.5 * errors**2 / max(beta, 1e-9), errors - beta / 2)
    torch.testing.assert_close(box_loss, smooth.sum() / len(sampled))


def test_no_more_anchors_than_the_batch_size_count():
    labels = [torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.0])]
    logits = torch.zeros(8, 1, requires_grad=True)
    zeros = torch.zeros(8, 4)

    objectness_loss, _ = network(1.0, sampled=2).compute_loss(logits, zeros, labels, list(zeros.split(4)))
    objectness_loss.backward()

    assert logits.grad is not None
    per_image = (logits.grad.view(2, 4) != 0).sum(dim=1)
    assert per_image.tolist() == [2, 2] and logits.grad[0] != 0
