"""Rectangles and ellipses and their exact boxes and masks."""

import pytest
import torch
from torchvision.ops import masks_to_boxes

from ws_algorithm.recipes.synthetic_objects import SyntheticObjects


def objects(count: int = 24, seed: int = 0, batch_size: int = 1, image_size: int = 64) -> SyntheticObjects:
    return SyntheticObjects(
        image_size, 4, batch_size=batch_size, seed=seed, masks=True, transforms=lambda *x: x, num_images=count
    )


def test_the_same_images_for_the_same_seed():
    first, again, other = (objects(seed=seed)[3] for seed in (0, 0, 1))

    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["masks"], again[1]["masks"])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], objects()[5][0])


def test_boxes_areas_and_masks_agree():
    for _, target in objects():
        masks = target["masks"]
        extent = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # torchvision's ends are the last pixels

        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), extent)
        assert torch.equal(target["area"], masks.flatten(1).sum(1).float())
        assert not (masks.sum(0) > 1).any()  # of what is seen
        assert len(target["labels"]) == len(masks) >= 1


def test_masks_cover_exactly_what_has_colour_and_colours_tell_labels():
    colours: dict[int, set[tuple[int, ...]]] = {}
    for image, target in objects():
        is_gray = (image == image[:1]).all(0)
        assert torch.equal(~is_gray, target["masks"].sum(0) > 0)
        for mask, label in zip(target["masks"], target["labels"].tolist(), strict=True):
            colours.setdefault(label, set()).update(map(tuple, image[:, mask.bool()].T.tolist()))

    assert set(colours) == {1, 2, 3, 4}
    assert len(set.union(*colours.values())) == 4 and all(len(found) == 1 for found in colours.values())


def test_rectangles_fill_their_box_and_ellipses_a_quarter_of_pi():
    shares: dict[int, list[float]] = {0: [], 1: []}
    for _, target in objects(60, image_size=256):
        if len(target["labels"]) == 1:  # not hidden
            x1, y1, x2, y2 = target["boxes"][0].tolist()
            shares[int(target["labels"][0]) % 2].append(float(target["area"][0]) / ((x2 - x1) * (y2 - y1)))

    assert shares[0] and set(shares[0]) == {1.0}
    # Ellipses of 30 pixels and more have a pixel's error along their rim
    assert shares[1] and all(abs(share - torch.pi / 4) < 0.03 for share in shares[1])


def test_wide_and_tall_images_in_turn():
    dataset = objects(4)

    assert [tuple(image.shape) for image, _ in dataset] == [(3, 48, 64), (3, 64, 48)] * 2
    assert dataset.sizes.tolist() == [[48, 64], [64, 48]] * 2


def test_there_is_a_full_batch():
    assert len(objects(4, batch_size=10)) == 10


@pytest.mark.parametrize("position", [-1, 4])
def test_there_are_no_images_beyond_the_last(position):
    with pytest.raises(IndexError, match=f"{position} is not a position among 4 images"):
        objects(4)[position]
