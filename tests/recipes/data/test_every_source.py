"""What all data sets have in common: batches, their order, augmentation, parts for each process, random images."""

from contextlib import nullcontext

import pytest
import torch
from composer.utils import dist
from torch import Tensor

from ws_algorithm.recipes import registry

from .sources import SOURCES, batches, build, dataset_of, everything, write_cifar

CASES = [(name, split) for name, source in SOURCES.items() for split in ("train", source.test_split)]
AUGMENTED = [name for name in SOURCES if name != "synthetic_images"]
WITH_ROOT = ["cifar10", "cifar100", "fashion_mnist", "image_folder", "imagenet"]


@pytest.fixture(autouse=True)
def _with_cifar(tmp_path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    parameters = getattr(request.node, "callspec", None)
    name = parameters.params.get("name") if parameters else None
    if name in ("cifar10", "cifar100"):
        write_cifar(tmp_path / "data", name, monkeypatch)


def test_every_data_set_is_tested():
    assert SOURCES.keys() | {"coco", "streaming_images"} == registry.DATA.keys()  # these have files of their own


@pytest.mark.parametrize(("name", "split"), CASES)
def test_batches(name, split):
    source = SOURCES[name]
    spec = build(name, split, batch_size=5)
    found = batches(spec)

    assert sum(len(labels) for _, labels in found) == source.size(split)
    assert {(images.dtype, labels.dtype) for images, labels in found} == {(torch.float32, torch.int64)}
    assert {images.shape[1:] for images, _ in found} == {source.shape}
    assert {int(label) for _, labels in found for label in labels} == set(range(source.num_classes))
    assert len(dataset_of(spec).classes) == source.num_classes


@pytest.mark.parametrize(("name", "split"), CASES)
def test_training_drops_the_last_partial_batch_and_evaluation_keeps_it(name, split):
    whole, rest = divmod(SOURCES[name].size(split), 7)
    assert rest > 0

    assert [len(labels) for _, labels in batches(build(name, split, batch_size=7))] == whole * [7] + [rest]
    training = build(name, split, batch_size=7, training=True)
    assert [len(labels) for _, labels in batches(training)] == whole * [7]
    assert len(training.dataloader) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOURCES)
def test_the_order_is_that_of_the_seed_and_the_epoch(name):
    still = {"augment": False} if name in AUGMENTED else {}

    def order(seed: int, epoch: int) -> Tensor:
        return everything(build(name, "train", batch_size=4, training=True, seed=seed, **still), epoch)[0]

    first = order(0, 0)

    assert torch.equal(order(0, 0), first)
    for other in (order(0, 1), order(1, 0)):
        assert not torch.equal(other, first)
    assert torch.equal(order(0, 1), order(0, 1))


@pytest.mark.parametrize("name", SOURCES)
def test_evaluation_reads_in_order_whatever_the_seed(name):
    split = SOURCES[name].test_split
    first = everything(build(name, split, batch_size=4, seed=0))[1]

    assert torch.equal(everything(build(name, split, batch_size=4, seed=1), epoch=3)[1], first)


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmentation_is_for_training_alone(name):
    def images(training: bool, augment: bool) -> Tensor:
        return everything(build(name, "train", batch_size=4, training=training, augment=augment))[0]

    assert torch.equal(images(False, True), images(False, False))
    assert not torch.equal(images(True, True), images(True, False))


@pytest.mark.parametrize("name", SOURCES)
def test_building_leaves_the_random_state_alone(name):
    state = torch.get_rng_state()
    build(name, "train", training=True, batch_size=4)

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["cifar10", "image_folder"])
def test_workers_augment_an_epoch_as_they_did_before(name):
    def epoch(number: int) -> Tensor:
        torch.manual_seed(number)  # of the process that starts them, which they must not depend on
        return everything(build(name, "train", batch_size=4, training=True, num_workers=2), epoch=1)[0]

    assert torch.equal(epoch(0), epoch(1))


@pytest.mark.parametrize("name", SOURCES)
def test_processes_share_an_evaluation(name, monkeypatch):
    split = SOURCES[name].test_split
    labels = everything(build(name, split, batch_size=4))[1].tolist()

    monkeypatch.setattr(dist, "run_local_rank_zero_first", nullcontext)  # needs processes that have met
    parts = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        parts.append(everything(build(name, split, batch_size=4))[1].tolist())

    # Every other image; an odd number is filled up with the first, which the Trainer leaves out again
    filled = labels + labels[:1] * (len(labels) % 2)
    assert parts == [filled[0::2], filled[1::2]]


@pytest.mark.parametrize("name", WITH_ROOT)
@pytest.mark.parametrize("training", [True, False])
def test_a_synthetic_root_needs_no_files(name, training, tmp_path):
    builder, source = registry.DATA[name], SOURCES[name]
    size = {"image_size": 16} if name.startswith("image") else {}
    split = "train" if training else source.test_split

    spec = builder(split, "synthetic", batch_size=8, training=training, **size)

    images, labels = everything(spec)
    classes = {"imagenet": 1000, "image_folder": 2}.get(name, source.num_classes)
    assert images.shape == (256, *source.shape)
    assert sorted(labels.tolist()) == sorted(i % classes for i in range(256))
    assert len(dataset_of(spec).classes) == classes
