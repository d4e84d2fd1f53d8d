"""ImageNet and anyone's folders: transforms, and broken files as a run meets them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ws_algorithm.__main__ import main
from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.loading import unreadable_line
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from ..runs import FEW
from ..test_distributed import launch
from .sources import CLASSES, batches, build, dataset_of, everything, truncate, write_folders

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


@pytest.mark.parametrize("name", ["imagenet", "image_folder"])
def test_evaluation_images_are_resized_cropped_in_the_center_and_normalized(name):
    images, labels = everything(build(name, "val"))

    transform = v2.Compose([v2.Resize(18), v2.CenterCrop(16), *TO_TENSOR, v2.Normalize(MEAN, STD)])
    expected = ImageFolder("data/val", transform)  # an implementation of its own, for folders without mistakes
    torch.testing.assert_close(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == expected.targets
    assert dataset_of(build(name, "val")).classes == expected.classes == CLASSES


def test_training_images_are_random_crops_and_flips():
    torch.manual_seed(3)
    spec = build("imagenet", "train", batch_size=4, training=True)
    images, labels = everything(spec)

    spec.dataloader.sampler.set_epoch(0)  # type: ignore[attr-defined]
    order = list(spec.dataloader.sampler)  # type: ignore[attr-defined]
    crops = [v2.RandomResizedCrop(16), v2.RandomHorizontalFlip()]
    files = ImageFolder("data/train", v2.Compose([*crops, *TO_TENSOR, v2.Normalize(MEAN, STD)]))
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()  # what an iterator over a DataLoader draws, of its own generator
    torch.manual_seed(3)
    expected = [files[position] for position in order]
    torch.testing.assert_close(images, torch.stack([image for image, _ in expected]))
    assert labels.tolist() == [label for _, label in expected]


def test_mean_and_std_are_those_that_are_given():
    plain = everything(build("image_folder", "val", mean=[0, 0, 0], std=[1, 1, 1]))[0]
    other = everything(build("image_folder", "val", mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0]))[0]

    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    assert plain.min() >= 0 and plain.max() <= 1
    torch.testing.assert_close(other, (plain - mean) / std)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mean": [0.5]}, r"`mean` \(=\[0.5\]\) must be three numbers"),
        ({"std": "0.5"}, r"`std` \(='0.5'\) must be three numbers"),
        ({"std": [0.5, 0.5, 0]}, r"`std` \(=\[0.5, 0.5, 0\]\) must be positive"),
        ({"image_size": 0}, r"`image_size` \(=0\) must be at least 1"),
        ({"image_size": 64, "resize": 32}, r"`resize` \(=32\) must be at least `image_size` \(=64\)"),
        ({"max_corrupt_share": 1.5}, r"`max_corrupt_share` \(=1.5\) must be from 0 to 1"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_numbers_out_of_range_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        build("image_folder", "val", **wrong)


def test_another_folder_can_be_a_split():
    write_folders(Path("data"), CLASSES, train=1, holdout=2)

    assert everything(build("image_folder", "holdout"))[1].tolist() == [0, 0, 1, 1, 2, 2]


def broken(share: float, training: bool, num_workers: int) -> tuple[Tensor, Tensor]:
    """Nine images; the first, the last and two neighbors in the middle are cut off."""
    write_folders(Path("data"), CLASSES, train=3)
    for name in ("ant/0", "bee/1", "bee/2", "cow/2"):
        truncate(Path(f"data/train/{name}.png"))
    spec = build(
        "image_folder",
        "train",
        batch_size=3,
        training=training,
        augment=False,
        num_workers=num_workers,
        max_corrupt_share=share,
    )
    return everything(spec)


def error_of(reads: Callable[[], object]) -> str:
    """What reading says when it fails."""
    try:
        reads()
    except ValueError as error:
        error.__traceback__ = None  # else torch's iterator is in a cycle, which is slow to go
        return str(error)
    return "everything was read"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_counts_broken_images_as_blank(num_workers):
    images, labels = broken(4 / 9, False, num_workers)

    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [bool((image == 0).all()) for image in images] == [i in (0, 4, 5, 8) for i in range(9)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_puts_the_next_readable_image_in_the_place_of_a_broken_one(num_workers):
    images, labels = broken(4 / 9, True, num_workers)

    # ant/0 -> ant/1, bee/1 and bee/2 -> cow/0, cow/2 -> round to ant/1
    readable = {"ant/1": 3, "ant/2": 1, "bee/0": 1, "cow/0": 3, "cow/1": 1}
    transform = v2.Compose([v2.Resize(18), v2.CenterCrop(16), *TO_TENSOR, v2.Normalize(MEAN, STD)])
    for name, count in readable.items():
        image = transform(Image.open(f"data/train/{name}.png"))
        same = [label for found, label in zip(images, labels, strict=True) if torch.equal(found, image)]
        assert len(same) == count and {int(label) for label in same} == {CLASSES.index(name[:3])}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_too_many_broken_images_stop_the_run(training, num_workers):
    message = error_of(lambda: broken(0.4, training, num_workers))

    assert (
        "4 of 9 images in data/train cannot be read (44.4 %), more than `max_corrupt_share` (=0.4) allows: " in message
    )
    assert "ant/0.png, bee/1.png, bee/2.png, cow/2.png. Mend or remove them" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_worker_processes_count_together_and_from_epoch_to_epoch(num_workers):
    write_folders(Path("data"), CLASSES, train=4)
    truncate(Path("data/train/ant/0.png"))
    spec = build("image_folder", "train", batch_size=2, num_workers=num_workers, max_corrupt_share=0.1)
    dataset = dataset_of(spec)
    batches(spec)
    assert dataset.is_corrupt.nonzero().flatten().tolist() == [0]

    truncate(Path("data/train/cow/3.png"))  # 2 of 12 are too many

    message = error_of(lambda: batches(spec, epoch=1))
    assert "2 of 12 images" in message and ": ant/0.png, cow/3.png. Mend" in message


def test_a_recipe_hears_of_a_missing_folder_before_it_trains():
    block = "{name: image_folder, split: train, root: nowhere}"
    with pytest.raises(RecipeError, match=r"`train_dataloader`: `root` \(='nowhere'\) has no folder 'train'"):
        train("quickstart", [f"train_dataloader={block}", "eval_dataloader=null"])


def photos(broken: int, *more: str, num_workers: int = 0) -> list[str]:
    """Overrides for 24 training and twelve evaluation images; the first of each class are no images, in both splits."""
    write_folders(Path("data"), CLASSES, train=8, val=4)
    for split in ("train", "val"):
        for name in CLASSES[:broken]:
            Path(f"data/{split}/{name}/0.png").write_text("no image")
    data = "name: image_folder, root: data, image_size: 16, resize: 18, max_corrupt_share: 0.4"
    return [
        *FEW,
        "model.in_channels=3",
        "global_train_batch_size=8",
        "global_eval_batch_size=4",
        f"train_dataloader={{{data}, split: train, num_workers: {num_workers}}}",
        f"eval_dataloader={{{data}, split: val, num_workers: {num_workers}}}",
        "save_folder=run",
        *more,
    ]


TOO_MANY = "images in data/train cannot be read"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_broken_images_end_the_command_with_one_line(num_workers, capsys):
    overrides = photos(2, "train_dataloader.max_corrupt_share=0.05", num_workers=num_workers)

    assert main(["train", "quickstart", *overrides]) == 2

    printed, logged = capsys.readouterr().err, Path("run/log.txt").read_text()
    line = (
        f"2 of 24 {TOO_MANY} (8.33 %), more than `max_corrupt_share` (=0.05) allows: ant/0.png, bee/0.png. "
        "Mend or remove them, or raise max_corrupt_share.\n"
    )
    assert printed.endswith(f"quickstart: 1 mistake\n  {line}") and printed.count(TOO_MANY) == 1
    assert f"ERROR ws_algorithm.recipes.train: {line}" in logged and logged.count(TOO_MANY) == 1
    assert "Traceback" not in printed + logged


def test_a_run_and_an_evaluation_end_with_the_number_of_broken_images(caplog):
    train("quickstart", photos(3))
    lines = [
        "`train_dataloader`: 3 of 24 images could not be read: ant/0.png, bee/0.png, cow/0.png",
        "`eval_dataloader`: 3 of 12 images could not be read: ant/0.png, bee/0.png, cow/0.png",
    ]
    assert caplog.messages[-2:] == lines and all(line in Path("run/log.txt").read_text() for line in lines)

    evaluate("run")
    assert caplog.messages[-1] == lines[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_refuses_too_many_broken_images_with_one_line(num_workers):
    train("quickstart", photos(1, num_workers=num_workers))

    with pytest.raises(RecipeError) as raised:
        evaluate("run", ["eval_dataloader.max_corrupt_share=0.05"])
    (line,) = raised.value.errors
    assert line.startswith("1 of 12 images in data/val cannot be read (8.33 %)") and "\n" not in line


def test_five_broken_images_are_named_at_the_end_and_none_if_there_is_none():
    spec = build("image_folder", "train", max_corrupt_share=1.0)
    batches(spec)
    assert unreadable_line(spec) is None and unreadable_line(None) is None
    assert unreadable_line(build("digits", "train")) is None

    for number in range(6):
        truncate(Path(f"data/train/ant/{number}.png"))
    batches(spec)

    names = ", ".join(f"ant/{number}.png" for number in range(5))
    assert unreadable_line(spec) == f"6 of 24 images could not be read: {names}, ..."


def test_of_two_processes_both_end_if_one_meets_too_many_broken_images():
    overrides = photos(1, "train_dataloader.max_corrupt_share=0.02", "max_duration=20ep")

    with pytest.raises(AssertionError) as raised:  # not TimeoutExpired
        launch("-m", "ws_algorithm", "train", "quickstart", *overrides)
    assert f"1 of 24 {TOO_MANY}" in str(raised.value)
