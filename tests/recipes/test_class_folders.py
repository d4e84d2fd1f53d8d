"""Which images a tree of folders has, and what its owner is told about it."""

import logging
import os
from pathlib import Path

import pytest
from composer.utils import dist

from ws_algorithm.recipes.class_folders import find_labelled_files

from .data.sources import random_image, write_folders


def write(*names: str, root: str = "data") -> None:
    """Files without content, and folders where a name ends in a slash."""
    for name in names:
        path = Path(root) / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()


def found(split: str, allow_empty_classes: bool = False) -> list[tuple[str, str]]:
    files = find_labelled_files("data", split, allow_empty_classes=allow_empty_classes)
    labels = [files.classes[label] for label in files.labels.tolist()]
    return list(zip(map(os.fsdecode, files.names.tolist()), labels, strict=True))


def test_images_come_in_the_order_of_their_names_under_the_class_of_their_folder():
    write("train/b/2.png", "train/b/10.JPEG", "train/a/x/1.jpg", "train/a/0.webp", "train/ä/ö.png")

    assert found("train") == [
        ("a/0.webp", "a"),
        ("a/x/1.jpg", "a"),
        ("b/10.JPEG", "b"),
        ("b/2.png", "b"),
        ("ä/ö.png", "ä"),
    ]


def test_a_link_to_a_folder_is_a_folder(tmp_path):
    write("1.png", root="elsewhere")
    write("train/a/1.png")
    Path("data/train/b").symlink_to(tmp_path / "elsewhere")

    assert found("train") == [("a/1.png", "a"), ("b/1.png", "b")]


def test_the_home_folder_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("train/a/1.png")

    assert find_labelled_files("~/data", "train").folder == tmp_path / "data" / "train"


def test_other_files_are_left_out_with_one_line(caplog):
    write("train/a/1.png", "train/a/notes.txt", "train/a/._1.png", "train/README", "train/.cache/2.png")
    write("train/b/.thumbs/3.png", "train/b/3.png")

    assert found("train") == [("a/1.png", "a"), ("b/3.png", "b")]
    (line,) = caplog.messages
    assert line == (
        "data/train: files left out that are no images by name: 3. "
        "data/train/README, data/train/a/._1.png, data/train/a/notes.txt."
    )


def test_many_other_files_are_counted(caplog):
    write("train/a/1.png", *(f"train/a/{i}.txt" for i in range(8)))

    found("train")
    assert "left out that are no images by name: 8." in caplog.text and "4.txt and 3 more." in caplog.text


def test_other_processes_than_the_first_are_silent(caplog, monkeypatch):
    write("train/a/1.png", "train/a/notes.txt")
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)

    assert found("train") == [("a/1.png", "a")]
    assert caplog.messages == []


def test_an_empty_class_is_an_error_unless_it_is_allowed(caplog):
    write("train/a/1.png", "train/b/", "train/c/notes.txt", "train/d/1.png")

    with pytest.raises(ValueError, match=r"data/train has no images of 2 of .*: b, c\. .*allow_empty_classes=true"):
        found("train")
    caplog.clear()
    assert found("train", allow_empty_classes=True) == [("a/1.png", "a"), ("d/1.png", "d")]
    assert find_labelled_files("data", "train", allow_empty_classes=True).labels.tolist() == [0, 3]
    assert "data/train has no images of 2 of the classes: b, c." in caplog.messages


def test_labels_of_an_evaluation_are_those_of_training(caplog):
    write("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png")

    files = find_labelled_files("data", "val")

    assert (files.labels.tolist(), files.classes) == ([2], ["a", "b", "c"])
    assert caplog.messages == ["data/val has no images of 2 of the classes: a, b."]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_class_that_training_lacks_is_an_error():
    write("train/a/1.png", "val/a/1.png", "val/b/1.png")

    with pytest.raises(ValueError, match=r"data/val has class folders that data/train lacks: b\. Labels are"):
        found("val")


def test_without_a_training_split_the_classes_are_the_own(caplog):
    write("val/b/1.png", "val/c/1.png")

    assert found("val") == [("b/1.png", "b"), ("c/1.png", "c")]
    assert caplog.messages == ["data/train is not there: the 2 classes are those of data/val."]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_says_what_is_expected(split):
    Path("data").mkdir()

    layout = "expected data/train/<class>/<image> and data/val/<class>/<image>"
    with pytest.raises(ValueError, match=rf"`root` \(='data'\) has no folder '{split}': {layout}\."):
        found(split)


def test_images_without_class_folders_are_counted():
    write("train/a/1.png", "val/1.png", "val/2.png", "val/.cache/3.png")

    with pytest.raises(ValueError, match=r"data/val has no class folders; files directly in it: 2: expected data/"):
        found("val")


def test_class_folders_without_any_image_are_an_error():
    write("train/a/1.gif", "train/b/")

    with pytest.raises(ValueError, match=r"data/train has no images in its class folders; .* end in \.jpg, \.jpeg"):
        found("train", allow_empty_classes=True)


def test_images_are_not_opened():
    write_folders(Path("data"), ["a"], train=1)
    random_image(0).save("data/train/a/real.png")
    write("train/a/empty.png")

    assert len(found("train")) == 3
