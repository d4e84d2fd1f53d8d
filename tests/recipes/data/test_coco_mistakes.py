"""Annotations that are malformed, one way after another: named and counted, or left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.recipes.coco_mistakes import sort_out

from .small_coco import WIDE, build, content, rectangle, run_lengths, samples, write
from .sources import dataset_of


def change(part: str, position: int, **values: Any) -> dict[str, Any]:
    changed = content()
    changed[part][position] |= values
    return changed


def in_object(**values: Any) -> dict[str, Any]:
    """Annotation 3, the only one on image 20, with something else in it."""
    return change("annotations", 2, **values)


EMPTY = "segmentation without area: 1 (3)"
OUTSIDE = "segmentation outside its image: 1 (3)"
FAR = "polygon more than a width or height outside its image: 1 (3)"
CROWD = "iscrowd that is not 0 or 1: 1 (3)"
AREA = "area that is no number from 0 on: 1 (3)"
POLYGON = "polygon of fewer than three points, or of an odd count of numbers: 1 (3)"
RUNS = "run lengths that do not fill the image: 1 (3)"
BOX = "box that is no [x, y, width, height]: 1 (3)"
CASES = {
    "zero width": (in_object(bbox=[2, 1, 0, 3]), "box without area: 1 (3)"),
    "zero height": (in_object(bbox=[2, 1, 4, 0.0]), "box without area: 1 (3)"),
    "negative width": (in_object(bbox=[2, 1, -4, 3]), "box without area: 1 (3)"),
    "right of the image": (in_object(bbox=[12, 1, 4, 3]), "box outside its image: 1 (3)"),
    "above the image": (in_object(bbox=[2, -3, 4, 3]), "box outside its image: 1 (3)"),
    "three numbers": (in_object(bbox=[2, 1, 4]), BOX),
    "no box": (in_object(bbox=None), BOX),
    "infinite box": (in_object(bbox=[2, 1, float("inf"), 3]), BOX),
    "no box of numbers": (in_object(bbox=["2", "1", "4", "3"]), BOX),
    "two points": (in_object(segmentation=[[1, 1, 3, 3]]), POLYGON),
    "odd count": (in_object(segmentation=[[1, 1, 3, 1, 3, 3, 2]]), POLYGON),
    "empty polygon": (in_object(segmentation=[[]]), POLYGON),
    "no polygon": (in_object(segmentation=[]), "empty segmentation: 1 (3)"),
    # Image 20 is 12 pixels wide and 8 high
    "polygon that pycocotools dies of": (in_object(segmentation=[[0, 0, 1e8, 0, 1e8, 5]]), FAR),
    "polygon far to the left": (in_object(segmentation=[[0, 0, 5, 0, -12.1, 5]]), FAR),
    "polygon far below": (in_object(segmentation=[rectangle(1, 1, 2, 2), [0, 0, 5, 0, 5, 16.1]]), FAR),
    "polygon of one point": (in_object(segmentation=[[5, 5, 5, 5, 5, 5]]), EMPTY),
    "polygon of a line": (in_object(segmentation=[[1, 1, 2, 3, 4, 7]]), EMPTY),
    "polygon of a line upwards": (in_object(segmentation=[[1, 7, 2, 5, 4, 1]]), EMPTY),
    "polygon to the right": (in_object(segmentation=[rectangle(12, 1, 2, 2)]), OUTSIDE),
    "polygons above and to the left": (
        in_object(segmentation=[rectangle(1, -3, 2, 2), rectangle(-3, 1, 2, 2), [1, 1, 2, 2, 3, 3]]),
        OUTSIDE,
    ),
    "background alone": (in_object(segmentation={"size": [8, 12], "counts": [96]}), EMPTY),
    "background alone, compressed": (in_object(segmentation=run_lengths(np.zeros(WIDE, np.uint8))), EMPTY),
    "text as crowd": (in_object(iscrowd="0"), CROWD),
    "crowd of two": (in_object(iscrowd=2), CROWD),
    "list as crowd": (in_object(iscrowd=[0]), CROWD),
    "text as area": (in_object(area="12"), AREA),
    "nan as area": (in_object(area=float("nan")), AREA),
    "list as area": (in_object(area=[12]), AREA),
    "negative area": (in_object(area=-1), AREA),
    "integer too large for a float": (in_object(bbox=[2, 1, 10**400, 3]), BOX),
    "list as category": (in_object(category_id=[2]), "unknown category: 1 (3)"),
    "one bad part": (in_object(segmentation=[rectangle(1, 1, 2, 2), [1, 1]]), POLYGON),
    "nan": (in_object(segmentation=[[1, 1, float("nan"), 1, 3, 3]]), POLYGON),
    "no segmentation": (in_object(segmentation=None), "no segmentation: 1 (3)"),
    "run lengths too short": (in_object(segmentation={"size": [8, 12], "counts": [90]}), RUNS),
    "run lengths of another size": (in_object(segmentation={"size": [12, 8], "counts": [96]}), RUNS),
    "negative run length": (in_object(segmentation={"size": [8, 12], "counts": [100, -4]}), RUNS),
    "no compression": (in_object(segmentation={"size": [8, 12], "counts": "\n\n"}), RUNS),
    "cut off compression": (in_object(segmentation={"size": [8, 12], "counts": "P"}), RUNS),
    "no run lengths": (in_object(segmentation={"size": [8, 12]}), RUNS),
    "unknown category": (in_object(category_id=3), "unknown category: 1 (3)"),
    "list as image": (in_object(image_id=[20]), "annotation on an image that is not listed: 1 (3)"),
    "unknown image": (in_object(image_id=7), "annotation on an image that is not listed: 1 (3)"),
    "annotation twice": (in_object(id=1), "annotation with the id of another: 1 (1)"),
    "text as id": (in_object(id="3"), "annotation whose id is no integer of 64 bits: 1 (position 2)"),
    "image with text as id": (
        change("images", 1, id="20"),
        "image whose id is no integer of 64 bits: 1 (position 1)",
    ),
    "image beyond 64 bits": (change("images", 1, id=2**63), "image whose id is no integer of 64 bits: 1 (position 1)"),
    "image with a list as id": (change("images", 1, id=[]), "image whose id is no integer of 64 bits: 1 (position 1)"),
    "missing file": (change("images", 1, file_name="x.png"), "missing image file: 1 (x.png)"),
    "missing folder": (change("images", 1, file_name="x/20.png"), "missing image file: 1 (x/20.png)"),
    "no size": (
        change("images", 1, width=None),
        "image without file_name, or without width and height in pixels: 1 (20.png)",
    ),
    "image twice": (change("images", 1, id=10), "image with the id of another: 1 (10)"),
}


@pytest.mark.parametrize(("changed", "says"), CASES.values(), ids=CASES)
def test_it_is_an_error_by_default(changed, says):
    if says.startswith(("image with the id", "image whose id")):
        changed["annotations"] = [a for a in changed["annotations"] if a["image_id"] != 20]
    write(changed)

    with pytest.raises(ValueError) as raised:
        build()
    assert str(raised.value) == (
        f"data/annotations/instances_train2017.json: malformed entries: 1. {says}. "
        "Mend them, or set malformed=skip to leave them out."
    )


@pytest.mark.parametrize(("changed", "says"), CASES.values(), ids=CASES)
def test_it_can_be_left_out_with_a_line_in_the_log(changed, says, caplog):
    if says.startswith(("image with the id", "image whose id")):
        changed["annotations"] = [a for a in changed["annotations"] if a["image_id"] != 20]
    write(changed)
    found = samples(build(malformed="skip"))

    assert caplog.messages == [f"data/annotations/instances_train2017.json: malformed entries left out: 1. {says}."]
    assert 20 not in found or len(found[20][1]["labels"]) == 0
    assert set(found) >= {10, 30, 40, 50, 60}
    assert len(found[10][1]["labels"]) == 2 and len(found[40][1]["labels"]) == 2


def test_what_is_no_entry_is_named_by_its_position(caplog):
    changed = content()
    changed["images"].append(None)
    changed["annotations"].append(7)
    write(changed)

    assert len(samples(build(malformed="skip"))) == 6
    assert (
        "image whose id is no integer of 64 bits: 1 (position 6); "
        "annotation whose id is no integer of 64 bits: 1 (position 7)"
    ) in caplog.text


@pytest.mark.parametrize(
    ("category", "says"),
    [
        ({"id": "2", "name": "fly"}, "category whose id is no integer of 64 bits: 1 (position 3)"),
        ({"id": 2**64, "name": "fly"}, "category whose id is no integer of 64 bits: 1 (position 3)"),
        ({"id": 5, "name": "fly"}, "category with the id of another: 1 (5)"),
    ],
)
def test_malformed_categories_have_no_label(category, says, caplog):
    changed = content()
    changed["categories"].append(category)
    write(changed)
    spec = build(malformed="skip")

    assert (dataset_of(spec).classes, dataset_of(spec).category_ids) == (["ant", "bee", "cow"], [2, 5, 90])
    assert dataset_of(spec).num_outputs == 4 and samples(spec)[10][1]["labels"].tolist() == [2, 3]
    assert f"left out: 1. {says}." in caplog.text


def test_there_must_be_a_category_left():
    changed = content()
    changed["categories"] = [{"id": "2"}]
    write(changed)

    with pytest.raises(ValueError, match="instances_train2017.json has no well-formed category"):
        build(malformed="skip")


@pytest.mark.parametrize(
    "polygon",
    [
        [-12, -8, 24, -8, 24, 16, -12, 16],  # one width and height beyond the image
        [3.1, 3.1, 3.2, 3.1, 3.15, 3.2],  # covers no pixel, and has an area
        [1, 1, 5, 5, 5, 1, 1, 5],  # crosses itself: the halves would cancel out
    ],
)
def test_polygons_at_the_limits_are_well_formed(polygon):
    write(in_object(segmentation=[polygon]))

    assert len(samples(build())[20][1]["labels"]) == 1


def test_what_is_left_is_trained_on():
    write(CASES["zero width"][0])

    assert set(samples(build(training=True, malformed="skip"))) == {10, 40, 60}


def test_kinds_are_counted_and_the_first_five_are_named():
    changed = content()
    changed["annotations"] += [changed["annotations"][0] | {"id": 100 + i, "bbox": [2, 1, 0, 0]} for i in range(7)]
    changed["annotations"].append(changed["annotations"][0] | {"id": 200, "category_id": 1})
    write(changed)
    Path("data/train2017/60.png").unlink()

    with pytest.raises(ValueError) as raised:
        build()
    assert (
        "malformed entries: 9. missing image file: 1 (60.png); "
        "box without area: 7 (100, 101, 102, 103, 104 and 2 more); unknown category: 1 (200)."
    ) in str(raised.value)


@pytest.mark.parametrize("changed", [CASES["two points"][0], CASES["no segmentation"][0], CASES["no run lengths"][0]])
def test_segmentations_matter_to_masks_alone(changed):
    write(changed)

    assert len(samples(build(masks=False))) == 6


@pytest.mark.parametrize("box", [[-3, -3, 20, 20], [11.9, 7.9, 0.1, 0.1], [0, 0, 12.004, 8.001], [-1, 2, 1.02, 3]])
def test_boxes_that_reach_beyond_the_image_are_well_formed(box):
    write(in_object(bbox=box))
    target = samples(build(training=True))[20][1]

    (x1, y1, x2, y2) = target["boxes"][0].tolist()
    assert 0 <= x1 < x2 <= 12 and 0 <= y1 < y2 <= 8


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_compressed_run_lengths_of_any_mask_are_well_formed(seed, share):
    mask = (np.random.default_rng(seed).random(WIDE) < share).astype(np.uint8)
    entry = in_object(segmentation=run_lengths(mask))
    Path("photos").mkdir(exist_ok=True)
    for image in entry["images"]:
        Path("photos", image["file_name"]).touch()

    good, mistakes = sort_out(entry, Path("photos"), masks=True)

    assert mask.any() == (not mistakes)
    assert len(good.annotations) == 6 + mask.any()
