"""Images of all kinds become RGB; broken ones are named, counted and passed over."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ws_algorithm.recipes.image_files import DataError, ImageFiles, read_rgb

from .data.sources import random_image, truncate

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def break_in(way: str, path: Path) -> None:
    if way == "truncated jpeg":
        random_image(0, 60, 60).save(path, "JPEG")
        truncate(path)
    elif way == "truncated png":
        random_image(0).save(path, "PNG")
        truncate(path)
    elif way == "broken png":
        random_image(0).save(path, "PNG")
        content = bytearray(path.read_bytes())
        content[40:60] = bytes(20)
        path.write_bytes(content)
    elif way == "empty":
        path.touch()
    elif way == "text":
        path.write_text("not an image\n")
    else:
        assert way == "missing"


BROKEN = ["truncated jpeg", "truncated png", "broken png", "empty", "text", "missing"]


def image_files(count: int, broken: set[int], *, training: bool, share: float = 1.0, way: str = "text") -> ImageFiles:
    """Images ``0.png`` to ``<count - 1>.png`` of one pixel that tells the position."""
    for position in range(count):
        path = Path(f"{position}.png")
        path.unlink(missing_ok=True)
        if position in broken:
            break_in(way, path)
        else:
            Image.new("RGB", (1, 1), (position + 1, 0, 0)).save(path)
    names = np.array([os.fsencode(f"{position}.png") for position in range(count)])
    blank = None if training else torch.zeros(3, 1, 1)
    labels = torch.arange(count)
    return ImageFiles(Path("."), names, labels, ["a"], pil_to_tensor, blank=blank, max_corrupt_share=share)


def everything(files: ImageFiles) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [files[position] for position in range(len(files))]


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = random_image(0).convert(mode)
    file = "image.tif" if mode == "CMYK" else "image.png"
    image.save(file)

    found = read_rgb(file)

    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_sixteen_bits_keep_the_upper_eight():
    pixels = LEVELS.astype(np.uint16) * 256 + 77
    Image.fromarray(pixels).save("deep.png")

    assert np.array_equal(np.asarray(read_rgb("deep.png")), np.repeat(LEVELS[:, :, None], 3, axis=2))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 65535), (-1, 200), (0, float("nan"))])
def test_floats_that_would_be_black_or_white_are_refused(low, high):
    Image.fromarray(np.array([[low, high]], dtype=np.float32)).save("floats.tif")

    with pytest.raises(ValueError, match=f"floating-point pixels from .* to {high:.3g}".replace("+", r"\+")):
        read_rgb("floats.tif")


@pytest.mark.parametrize("high", [0, 200])
def test_floats_up_to_255_are_read(high):
    Image.fromarray(np.array([[0, high]], dtype=np.float32)).save("floats.tif")

    assert np.asarray(read_rgb("floats.tif")).tolist() == [[[0] * 3, [high] * 3]]


def test_a_palette_with_transparency_is_read_without_a_warning():
    Image.fromarray(LEVELS).convert("P").save("palette.png", transparency=bytes(range(256)))

    assert read_rgb("palette.png").mode == "RGB"


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    random_image(0, height=20, width=30).save("turned.jpg", exif=exif)

    assert read_rgb("turned.jpg").size == (30, 20)


@pytest.mark.parametrize("way", BROKEN)
def test_whatever_is_broken_is_passed_over_and_named(way, caplog):
    files = image_files(3, {1}, training=True, way=way)

    assert [int(label) for _, label in everything(files)] == [0, 2, 2]
    (line,) = caplog.messages
    assert line.startswith("./1.png cannot be read (") and line.endswith("); the next image takes its place.")


def test_a_decompression_bomb_is_passed_over(monkeypatch, caplog):
    files = image_files(3, {1}, training=False, way="missing")
    random_image(0).save("1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 24 // 2 - 1)

    assert [int(image.sum()) for image, _ in everything(files)] == [1, 0, 3]
    assert "1.png cannot be read (Image size (480 pixels) exceeds limit of 478 pixels" in caplog.text


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))))
def test_an_image_is_replaced_by_the_next_readable_one(case):
    count, broken = case
    files = image_files(count, broken, training=True)

    for position in (*range(count), *reversed(range(count))):
        expected = next(i % count for i in range(position, position + count) if i % count not in broken)
        image, label = files[position]
        assert (int(image[0, 0, 0]) - 1, int(label)) == (expected, expected)
    assert set(files.is_corrupt.nonzero().flatten().tolist()) == broken


def test_in_evaluation_it_is_blank_under_its_own_label():
    files = image_files(4, {0, 2}, training=False)

    assert [(int(image.sum()), int(label)) for image, label in everything(files)] == [(0, 0), (2, 1), (0, 2), (4, 3)]


def test_a_file_is_named_once(caplog):
    files = image_files(3, {0}, training=False)
    for _ in range(3):
        everything(files)

    assert caplog.messages == ["./0.png cannot be read (not an image, or a broken one); it counts as a blank image."]


@pytest.mark.parametrize("training", [True, False])
def test_the_share_is_of_all_images_and_may_be_reached(training):
    everything(image_files(4, {0}, training=training, share=0.25))

    with pytest.raises(
        DataError, match=r"2 of 4 images in \. cannot be read \(50 %\), .*\(=0.25\) allows: 0.png, 3.png"
    ):
        everything(image_files(4, {0, 3}, training=training, share=0.25))


def test_up_to_five_files_are_named():
    files = image_files(9, set(range(7)), training=False, share=0.7)

    with pytest.raises(ValueError, match=r"7 of 9 .*\(77.8 %\).*: 0.png, 1.png, 2.png, 3.png, 4.png and 2 more\. Mend"):
        everything(files)


def test_those_that_could_not_be_read_are_listed_by_position():
    files = image_files(12, {2, 10}, training=False)
    assert files.unreadable == []

    files[10]
    assert files.unreadable == ["10.png"]
    everything(files)
    assert files.unreadable == ["2.png", "10.png"]


@pytest.mark.parametrize(
    "around", ["", "Caught DataError in DataLoader worker process 0.\nTraceback:\n  x\na.b.DataError: "]
)
def test_an_error_is_one_line_with_a_traceback_around_it_or_without(around):
    assert DataError(f"{around}2 of 4 images:\n 0.png").in_one_line() == "2 of 4 images: 0.png"


def test_too_many_stay_too_many():
    files = image_files(2, {0}, training=True, share=0.1)

    for _ in range(2):
        with pytest.raises(ValueError, match="1 of 2 images"):
            files[0]


def test_no_readable_image_at_all_is_an_error():
    with pytest.raises(DataError, match=r"None of the 3 images in \. can be read: 0.png, 1.png, 2.png\."):
        image_files(3, {0, 1, 2}, training=True)[1]
    assert not any(image.any() for image, _ in everything(image_files(3, {0, 1, 2}, training=False)))


@pytest.mark.parametrize("position", [-1, 3])
def test_there_are_no_images_beyond_the_last(position):
    with pytest.raises(IndexError, match=f"{position} is not a position among 3 images"):
        image_files(3, {1}, training=True)[position]


def test_a_mistake_in_a_transform_is_not_taken_for_a_broken_file():
    def fail(image: Image.Image) -> torch.Tensor:
        raise RuntimeError("a mistake")

    files = image_files(2, set(), training=True)
    files.transform = fail

    with pytest.raises(RuntimeError, match="a mistake"):
        files[0]
    assert not files.is_corrupt.any()
