"""Objects of a small data set in COCO's layout: which images, which objects, in which form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from ws_algorithm.recipes.build import build_data, check_same_classes
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError

from .small_coco import (
    ANNOTATIONS,
    SIZES,
    TALL,
    WIDE,
    WITH_OBJECTS,
    annotation,
    build,
    content,
    pixels,
    run_lengths,
    samples,
    write,
)
from .sources import dataset_of, truncate


def test_images_are_as_their_files_from_0_to_1():
    write()

    for number, (image, _) in samples(build()).items():
        assert_close(image, torch.from_numpy(pixels(number)).permute(2, 0, 1) / 255)


def test_gray_images_become_rgb():
    write()
    Image.new("L", (12, 8), 51).save("data/train2017/10.png")

    assert_close(samples(build())[10][0], torch.full((3, *WIDE), 0.2))


def test_evaluation_keeps_every_image_in_order_and_every_object():
    write()
    found = samples(build())

    assert list(found) == list(SIZES)
    assert {number: len(target["labels"]) for number, (_, target) in found.items()} == {
        10: 2, 20: 1, 30: 0, 40: 2, 50: 1, 60: 1,
    }  # fmt: skip
    assert found[40][1]["iscrowd"].tolist() == [0, 1] and found[50][1]["iscrowd"].tolist() == [1]


def test_training_leaves_out_crowds_and_images_without_objects():
    write()
    found = samples(build(training=True))

    assert set(found) == WITH_OBJECTS
    assert found[40][1]["labels"].tolist() == [1]
    assert not any(target["iscrowd"].any() for _, target in found.values())


def test_labels_are_contiguous_in_the_order_of_category_ids():
    write()
    spec = build()
    dataset = dataset_of(spec)

    # Categories 90, 2 and 5 stand in the file in this order
    assert (dataset.classes, dataset.category_ids) == (["ant", "bee", "cow"], [2, 5, 90])
    assert samples(spec)[10][1]["labels"].tolist() == [2, 3]
    assert dataset.num_outputs == 4


def test_targets_of_an_image():
    write()
    target = samples(build())[10][1]

    # Boxes [2, 1, 4, 3] and [6, 2, 5, 6] of x, y, width, height; the area of the first is that of its box
    assert torch.equal(target["boxes"], torch.tensor([[2.0, 1, 6, 4], [6, 2, 11, 8]]))
    assert target["area"].tolist() == [12, 17.5]
    expected = torch.zeros(2, *WIDE, dtype=torch.uint8)
    expected[0, 1:4, 2:6] = 1
    expected[1, 2:8, 6:11] = 1
    assert torch.equal(target["masks"], expected)
    assert {name: value.dtype for name, value in target.items() if isinstance(value, Tensor)} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "masks": torch.uint8,
        "area": torch.float32,
        "iscrowd": torch.int64,
    }


def test_an_image_without_objects_has_empty_targets():
    write()
    target = samples(build())[30][1]

    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["masks"].shape == (0, *WIDE)
    assert target["area"].shape == target["iscrowd"].shape == (0,)


def test_a_crowd_of_run_lengths():
    write()
    mask = samples(build())[50][1]["masks"][0]

    expected = torch.zeros(TALL, dtype=torch.uint8)
    expected[:, 1:3] = 1  # 12 pixels without, 24 with, column by column of 12
    assert torch.equal(mask, expected)


def test_masks_can_be_left_out():
    write()

    assert all("masks" not in target for _, target in samples(build(masks=False)).values())


def test_an_area_that_is_not_stated_is_that_of_the_box():
    changed = content()
    del changed["annotations"][1]["area"], changed["annotations"][1]["iscrowd"]
    write(changed)

    assert samples(build())[10][1]["area"].tolist() == [12, 30]


def test_an_area_or_a_crowd_of_null_is_as_none_at_all():
    changed = content()
    changed["annotations"][1] |= {"area": None, "iscrowd": None}
    changed["annotations"][3]["iscrowd"] = True
    write(changed)
    target = samples(build())[10][1]

    assert target["area"].tolist() == [12, 30] and target["iscrowd"].tolist() == [0, 0]
    assert samples(build())[40][1]["iscrowd"].tolist() == [1, 1]
    assert set(samples(build(training=True))) == WITH_OBJECTS - {40}


def test_boxes_are_clipped_in_training_and_left_alone_in_evaluation():
    changed = content()
    changed["annotations"][0]["bbox"] = [-1.5, 6, 4, 2.25]
    write(changed)

    assert samples(build(training=True))[10][1]["boxes"][0].tolist() == [0, 6, 2.5, 8]
    assert samples(build())[10][1]["boxes"][0].tolist() == [-1.5, 6, 2.5, 8.25]


def test_a_flip_takes_boxes_and_masks_along():
    write()
    found, flipped = samples(build(training=True)), samples(build(training=True, flip=1.0))

    for number, (image, target) in found.items():
        _, width = SIZES[number]
        x1, y1, x2, y2 = target["boxes"].T
        assert torch.equal(flipped[number][0], image.flip(2))
        assert torch.equal(flipped[number][1]["boxes"], torch.stack([width - x2, y1, width - x1, y2], 1))
        assert torch.equal(flipped[number][1]["masks"], target["masks"].flip(2))
    assert torch.equal(samples(build(flip=1.0))[10][0], samples(build())[10][0])


def test_folder_and_file_can_have_other_names():
    write()
    Path("data/train2017").rename("data/photos")
    ANNOTATIONS.rename("data/labels.json")

    assert list(samples(build("any", images="photos", annotations="labels.json"))) == list(SIZES)


def test_images_in_folders_below():
    changed = content()
    changed["images"][0]["file_name"] = "below/10.png"
    write(changed)
    Path("data/train2017/below").mkdir()
    Path("data/train2017/10.png").rename("data/train2017/below/10.png")

    assert_close(samples(build())[10][0], torch.from_numpy(pixels(10)).permute(2, 0, 1) / 255)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_replaced_in_training_with_its_objects(num_workers):
    write()
    truncate(Path("data/train2017/40.png"))
    spec = build(training=True, num_workers=num_workers, max_corrupt_share=0.25)

    found = [target["image_id"] for batch in spec.dataloader for target in batch[1]]
    assert sorted(found) == [10, 20, 60, 60]


def test_an_unreadable_image_is_black_in_evaluation_over_its_objects(caplog):
    write()
    truncate(Path("data/train2017/40.png"))
    image, target = samples(build(max_corrupt_share=0.25))[40]

    assert torch.equal(image, torch.zeros(3, *TALL))
    assert target["labels"].tolist() == [1, 2]
    assert "data/train2017/40.png cannot be read" in caplog.text


def test_an_image_of_another_size_than_stated_counts_as_unreadable(caplog):
    write()
    Image.fromarray(pixels(10).swapaxes(0, 1)).save("data/train2017/10.png")

    says = (
        r"1 of 6 images in .*train2017 cannot be read \(16.7 %\).*: 10.png\. "
        r"The last: 10.png, 8x12 pixels instead of the 12x8 that are stated\. Mend"
    )
    with pytest.raises(ValueError, match=says):
        samples(build())
    assert "10.png cannot be read (8x12 pixels instead of the 12x8 that are stated)" in caplog.text


def test_a_batch_is_two_lists_that_split_and_move():
    write()
    spec = build(batch_size=5)
    first, last = spec.dataloader

    class Meta(DeviceCPU):
        def tensor_to_device(self, tensor: Tensor) -> Tensor:
            return tensor.to("meta")

    assert [len(part) for part in first] == [5, 5] and [spec.get_num_samples_in_batch(b) for b in (first, last)] == [
        5,
        1,
    ]
    split = spec.split_batch(first, 2)
    assert [[target["image_id"] for target in targets] for _, targets in split] == [[10, 20], [30, 40], [50]]
    assert all(len(images) == len(targets) for images, targets in split)
    assert len(spec.split_batch(last, 2)) == 1  # without the warning of Composer's own
    images, targets = Meta().batch_to_device(first)
    assert isinstance(images, list) and {image.device.type for image in images} == {"meta"}
    assert {value.device.type for target in targets for value in target.values() if isinstance(value, Tensor)} == {
        "meta"
    }
    assert targets[0]["image_id"] == 10


def test_a_synthetic_root_needs_no_files():
    spec = build(root="synthetic", batch_size=4, training=True, synthetic_image_size=32, synthetic_num_classes=3)
    dataset = dataset_of(spec)

    assert (dataset.classes, dataset.num_outputs) == (["ellipse 1", "rectangle 2", "ellipse 3"], 4)
    for images, targets in spec.dataloader:
        assert len({image.shape for image in images}) == 1
        for image, target in zip(images, targets, strict=True):
            assert target["masks"].shape[1:] == image.shape[1:] and target["boxes"].shape == (len(target["labels"]), 4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"root": "nowhere"},
            r"`root` \(='nowhere'\) has no folder train2017 and no file annotations/instances_train2",
        ),
        (
            {"split": "val"},
            r"has no folder val2017 and no file .*: expected data/val2017/<image> and data/annotations/",
        ),
        ({"images": "photos"}, r"`root` \(='data'\) has no folder photos: expected data/photos/<image>"),
        ({"group_size": 3}, r"`group_size` \(=3\) must divide the batch of one device, which is 2"),
        ({"group_size": 0}, r"`group_size` \(=0\) must divide"),
        ({"flip": 1.5}, r"`flip` \(=1.5\) must be from 0 to 1"),
        ({"max_corrupt_share": 2}, r"`max_corrupt_share` \(=2\)"),
        ({"root": "synthetic", "synthetic_image_size": 8}, r"`synthetic_image_size` \(=8\) must be at least 16"),
        ({"root": "synthetic", "synthetic_num_classes": 0}, r"`synthetic_num_classes` \(=0\) must be at least 1"),
    ],
)
def test_refusals(options, says):
    write()

    with pytest.raises(ValueError, match=says):
        build(batch_size=2, **options)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"instances_train2017.json cannot be read as COCO annotations \(Expecting property name"),
        ("[]", r"cannot be read as COCO annotations \(it is no object with images, annotations, categories\)"),
        (b"\xff", r"cannot be read as COCO annotations \("),
        ('{"images": []}', "has no list of annotations, categories; COCO's format has images, annotations, categories"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
    ],
)
def test_files_that_are_no_annotations(text, says):
    write()
    ANNOTATIONS.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ValueError, match=says):
        build()


def test_a_split_without_objects_cannot_be_trained_on():
    write(content() | {"annotations": []})

    assert len(samples(build())) == 6
    with pytest.raises(ValueError, match="instances_train2017.json has no image with objects other than crowds"):
        build(training=True)


def test_reading_prints_nothing(capsys):
    write()
    build()

    assert capsys.readouterr() == ("", "")


def test_pycocotools_are_asked_for(monkeypatch):
    write()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ValueError, match='need pycocotools: pip install "ws-algorithm'):
        build()


def test_a_model_needs_an_output_for_the_background():
    write()
    block = "{name: coco, split: train, root: data}"
    overrides = [f"train_dataloader={block}", "eval_dataloader=null", "model.num_classes=3"]
    overrides += ["global_train_batch_size=2", "device_train_microbatch_size=1"]

    with pytest.raises(RecipeError, match=r"`model.num_classes` \(=3\) is less than the 4 of `train_dataloader`"):
        build_data("x", resolve_recipe("quickstart", overrides), "train_dataloader", training=True)


def test_splits_must_have_the_same_categories():
    fewer, renamed = content(), content()
    fewer["categories"] = fewer["categories"][:2] + [{"id": 6, "name": "bee"}]
    fewer["annotations"] = []
    renamed["categories"][2] = {"id": 5, "name": "wasp"}
    write(val=fewer | {"categories": fewer["categories"][:2]}, moved=fewer, renamed=renamed)

    for split, differ in (("val", "'bee' and 'cow'"), ("renamed", "'bee' and 'wasp'")):
        with pytest.raises(RecipeError, match=f"`eval_dataloader` has other classes than `train_dataloader`: {differ}"):
            check_same_classes("x", build(), build(split))
    for evaluation in (build(), build("moved"), None):
        check_same_classes("x", build(), evaluation)


def test_polygons_of_several_parts_and_compressed_run_lengths():
    expected = np.zeros(WIDE, dtype=np.uint8)
    expected[1:3, 1:3] = expected[5:7, 8:11] = 1
    parts = [[1, 1, 3, 1, 3, 3, 1, 3], [8, 5, 11, 5, 11, 7, 8, 7]]
    changed = content()
    changed["annotations"] = [
        annotation(1, 10, 2, [1, 1, 10, 6], segmentation=parts),
        annotation(2, 10, 2, [1, 1, 10, 6], segmentation=run_lengths(expected)),
    ]
    write(changed)

    masks = samples(build(training=True))[10][1]["masks"]
    assert torch.equal(masks, torch.from_numpy(expected).expand(2, -1, -1))
