"""The order of images: wide and tall apart, anew in each epoch, shared by processes, resumed within an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn

from .small_coco import batches, build, samples, write

SMALL: dict[str, Any] = {"root": "synthetic", "training": True, "synthetic_image_size": 16, "masks": False}


def ids(spec: Any, epoch: int = 0) -> list[list[int]]:
    return [[target["image_id"] for _, target in batch] for batch in batches(spec, epoch)]


def test_wide_and_tall_images_are_in_separate_batches():
    spec = build(batch_size=8, **SMALL)

    epochs = [ids(spec, epoch) for epoch in range(3)]
    for found in epochs:
        assert len(found) == 32 and sorted(sum(found, [])) == list(range(256))
        assert all(len({number % 2 for number in batch}) == 1 for batch in found)  # even ones are wide
    assert {batch[0] % 2 for batch in epochs[0][:16]} == {0, 1}


def test_groups_can_be_smaller_than_a_batch_or_one():
    pairs = sum(ids(build(batch_size=8, group_size=2, **SMALL)), [])
    assert all(first % 2 == second % 2 for first, second in zip(pairs[::2], pairs[1::2], strict=True))

    mixed = ids(build(batch_size=8, group_size=1, **SMALL))
    assert any(len({number % 2 for number in batch}) == 2 for batch in mixed)


def test_the_order_is_that_of_the_seed_and_the_epoch():
    first = ids(build(batch_size=4, **SMALL))

    assert ids(build(batch_size=4, **SMALL)) == first
    assert ids(build(batch_size=4, **SMALL), epoch=1) != first
    assert ids(build(batch_size=4, seed=1, **SMALL)) != first


def test_evaluation_is_in_order():
    found = ids(build(batch_size=6, **{**SMALL, "training": False}), epoch=3)

    assert found == [list(range(start, min(start + 6, 256))) for start in range(0, 256, 6)]


def of_ranks(count: int, batch_size: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[list[int]]]:
    parts = []
    for rank in range(count):
        monkeypatch.setattr(dist, "get_world_size", lambda: count)
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        parts.append(ids(build(batch_size=batch_size, **SMALL | options), epoch=2))
    return parts


@pytest.mark.parametrize(("count", "batch_size"), [(2, 4), (3, 5), (8, 1)])
def test_processes_have_as_many_batches_and_no_image_twice(count, batch_size, monkeypatch):
    parts = of_ranks(count, batch_size, monkeypatch)

    assert {len(part) for part in parts} == {256 // (count * batch_size)}
    seen = sum((batch for part in parts for batch in part), [])
    assert len(set(seen)) == len(seen) == 256 // (count * batch_size) * count * batch_size


def test_the_images_of_a_step_do_not_depend_on_how_many_devices_share_it(monkeypatch):
    (one,) = of_ranks(1, 8, monkeypatch, group_size=2)
    steps = [sum(batches, []) for batches in zip(*of_ranks(4, 2, monkeypatch, group_size=2), strict=True)]

    assert steps == one


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_an_evaluation(rank, monkeypatch):
    write()
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_global_rank", lambda: rank)

    assert list(samples(build())) == [[10, 30, 50], [20, 40, 60]][rank]


class Brightness(ComposerModel):
    """Learns the mean of the images; remembers which images it saw, in micro-batches, and their left halves."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], float]] = []

    def forward(self, batch: Any) -> Tensor:
        images, targets = batch
        halves = torch.stack([image[:, :, : image.shape[2] // 2].mean() for image in images])
        self.seen.append(([target["image_id"] for target in targets], halves.mean().item()))
        return halves.mean() - self.mean

    def loss(self, outputs: Tensor, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        return outputs.square()


def fit(duration: str, seed: int = 0, workers: int = 0, **arguments: Any) -> tuple[Brightness, Trainer]:
    model = Brightness()
    spec = build(batch_size=2, flip=0.5, training=True, num_workers=workers)
    trainer = Trainer(
        model=model,
        train_dataloader=spec,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration=duration,
        seed=seed,
        device="cpu",
        progress_bar=False,
        **arguments,
    )
    trainer.fit()
    trainer.close()
    return model, trainer


def test_the_trainer_counts_images_and_splits_batches():
    write()
    model, trainer = fit("2ep", device_train_microbatch_size=1)

    assert (int(trainer.state.timestamp.batch), int(trainer.state.timestamp.sample)) == (4, 8)
    assert [len(numbers) for numbers, _ in model.seen] == [1] * 8
    assert sorted(number for numbers, _ in model.seen[:4] for number in numbers) == [10, 20, 40, 60]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch", [1, 3, 5])  # within the first three epochs, which have two batches each
def test_a_run_resumes_within_an_epoch(batch, workers):
    write()
    whole, _ = fit("4ep", workers=workers)
    fit(f"{batch}ba", workers=workers, save_folder="run", save_interval="1ba", save_filename="{batch}.pt")

    resumed, _ = fit("4ep", seed=0, workers=workers, load_path=str(Path("run", f"{batch}.pt")))

    assert len(whole.seen) == 8
    assert resumed.seen == whole.seen[batch:]
    assert torch.equal(resumed.mean, whole.mean)
