from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import DataSpec
from PIL import Image

from ws_algorithm.recipes.data.cifar import build_cifar10_dataspec
from ws_algorithm.recipes.data.coco import build_coco_dataspec
from ws_algorithm.recipes.data.fashion_mnist import build_fashion_mnist_dataspec
from ws_algorithm.recipes.data.image_folder import build_image_folder_dataspec
from ws_algorithm.recipes.given_images import find_images, read_upright

from .painted import write_painted
from .runs import write_fashion_mnist


def dataset_of(spec: DataSpec) -> Any:
    return spec.dataloader.dataset  # pyright: ignore[reportAttributeAccessIssue]


def image(seed: int = 0, height: int = 8, width: int = 12) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_files_folders_and_patterns_give_each_file_once():
    Path("photos/more").mkdir(parents=True)
    for name in ("photos/b.PNG", "photos/a.bmp", "photos/more/c.png", "d.png"):
        image().save(name)
    Path("photos/notes.txt").write_text("no image")

    files, errors = find_images(["d.png", "photos", "photos/*.bmp", "photos/**/c.png", "./d.png"])

    assert errors == []
    assert [str(file) for file in files] == ["d.png", "photos/a.bmp", "photos/b.PNG", "photos/more/c.png"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_mode_is_read_in_rgb(mode):
    picture = image().convert(mode) if mode != "I;16" else Image.fromarray(np.full((8, 12), 40000, dtype=np.uint16))
    name = "x.tif" if mode == "CMYK" else "x.png"
    picture.save(name)

    read = read_upright(Path(name))

    assert read.mode == "RGB" and read.size == (12, 8)
    if mode == "I;16":
        assert set(np.asarray(read).flatten()) == {40000 // 256}


def test_a_picture_is_turned_as_its_file_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    picture = image()
    picture.save("x.png", exif=exif)

    read = np.asarray(read_upright(Path("x.png")))

    np.testing.assert_array_equal(read, np.rot90(np.asarray(picture), k=-1))


def test_a_picture_becomes_what_its_data_set_makes_of_it(tmp_path):
    write_fashion_mnist(tmp_path)
    write_painted(tmp_path / "coco")
    for split in ("train", "test"):
        for number, name in enumerate(["airplane", "automobile", "bird", "cat", "deer"]):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            image(number, 32, 32).save(tmp_path / "folder" / split / name / "x.png")
    for split in ("train", "test"):
        for name in ["dog", "frog", "horse", "ship", "truck"]:
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            image(9, 32, 32).save(tmp_path / "folder" / split / name / "x.png")
    common = {"batch_size": 2, "training": False}
    root = str(tmp_path / "folder")
    fashion = dataset_of(build_fashion_mnist_dataspec("test", str(tmp_path), **common))
    pixels = fashion.data[3].numpy()
    cases = [
        (build_cifar10_dataspec("test", root, **common), 1, image(1, 32, 32)),
        (build_image_folder_dataspec("test", root, image_size=24, resize=28, **common), 2, image(2, 32, 32)),
    ]
    for spec, position, picture in cases:
        dataset = dataset_of(spec)
        assert torch.equal(dataset.image_input(picture), dataset[position][0])
    assert torch.equal(fashion.image_input(Image.fromarray(pixels).convert("RGB")), fashion[3][0])

    objects = dataset_of(build_coco_dataspec("val", str(tmp_path / "coco"), **common))
    picture = Image.open(tmp_path / "coco" / "val2017" / "4.png")  # the first, by its id
    assert torch.equal(objects.image_input(picture), objects[0][0])
    drawn = dataset_of(build_coco_dataspec("val", "synthetic", **common))
    again = Image.fromarray((255 * drawn[0][0]).round().to(torch.uint8).permute(1, 2, 0).numpy())
    assert torch.equal(drawn.image_input(again), drawn[0][0])


def test_a_large_picture_becomes_one_of_small_ones(tmp_path):
    write_fashion_mnist(tmp_path)
    fashion = dataset_of(build_fashion_mnist_dataspec("test", str(tmp_path), batch_size=2, training=False))
    gray = Image.new("RGB", (300, 100), (51, 51, 51))

    # 51 of 255 is 0.2, normalized by Fashion-MNIST's mean and deviation
    torch.testing.assert_close(fashion.image_input(gray), torch.full((1, 28, 28), (0.2 - 0.2860) / 0.3530))
