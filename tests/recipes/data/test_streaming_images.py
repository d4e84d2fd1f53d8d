"""Shards of MosaicML Streaming; what needs the library is left out where it is not installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.utils import dist
from torchvision.transforms import v2

from ws_algorithm.recipes.data.streaming_images import _Collate, build_streaming_images_dataspec

from .sources import random_image

needs_streaming = pytest.mark.skipif(
    importlib.util.find_spec("streaming") is None, reason='needs the extra "streaming", which pins numpy'
)


def write_shards(folder: Path, count: int) -> None:
    from streaming import MDSWriter  # pyright: ignore[reportMissingImports]

    with MDSWriter(out=str(folder), columns={"x": "png", "y": "int"}, size_limit=10_000) as writer:
        for i in range(count):
            writer.write({"x": random_image(i).convert("L" if i % 5 == 0 else "RGB"), "y": i})


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", None)

    with pytest.raises(ValueError, match=r'pip install "ws-algorithm\[streaming\]"'):
        build_streaming_images_dataspec("shards", batch_size=2, training=True)


def test_numbers_are_checked_first():
    with pytest.raises(ValueError, match=r"`image_size` \(=0\)"):
        build_streaming_images_dataspec("shards", batch_size=2, training=True, image_size=0)


def test_samples_become_batches_whatever_their_encoding(tmp_path):
    images = [random_image(i) for i in range(3)]
    images[2] = images[2].convert("L")
    images[1].save("image.png")
    samples = [{"picture": image, "kind": np.int64(i)} for i, image in enumerate(images)]
    samples[1]["picture"] = Path("image.png").read_bytes()

    found, labels = _Collate(v2.PILToTensor(), "picture", "kind")(samples)

    assert torch.equal(found, torch.stack([v2.functional.pil_to_tensor(image.convert("RGB")) for image in images]))
    assert (labels.tolist(), labels.dtype) == ([0, 1, 2], torch.int64)


@needs_streaming
@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_every_image_once_in_order(tmp_path, num_workers):
    write_shards(tmp_path / "shards" / "val", 23)

    spec = build_streaming_images_dataspec(
        str(tmp_path / "shards"),
        split="val",
        batch_size=4,
        training=False,
        image_size=16,
        resize=18,
        num_workers=num_workers,
    )

    found = list(spec.dataloader)
    assert [label for _, labels in found for label in labels.tolist()] == list(range(23))
    assert len(spec.dataloader) == 6  # type: ignore[arg-type]
    transform = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(found[0][0][1], normalize(transform(random_image(1))).as_subclass(torch.Tensor))


@needs_streaming
def test_training_shuffles_by_the_seed_and_drops_the_rest(tmp_path):
    write_shards(tmp_path / "shards", 23)

    def order(seed: int) -> list[int]:
        spec = build_streaming_images_dataspec(
            str(tmp_path / "shards"), batch_size=4, training=True, seed=seed, image_size=16
        )
        return [label for _, labels in spec.dataloader for label in labels.tolist()]

    assert len(order(0)) == len(set(order(0))) == 20
    assert order(0) == order(0) != order(1)


@needs_streaming
def test_shards_and_columns_that_are_missing_are_named(tmp_path):
    write_shards(tmp_path / "shards", 3)
    local = str(tmp_path / "shards")

    with pytest.raises(ValueError, match=r"`label` \(='cls'\) is not a column of the shards, which have x, y\."):
        build_streaming_images_dataspec(local, batch_size=2, training=True, label="cls")
    with pytest.raises(ValueError, match=r"`local` .* `split` \(='val'\): .*index.json"):
        build_streaming_images_dataspec(local, batch_size=2, training=True, split="val")
    assert dist.get_world_size() == 1
