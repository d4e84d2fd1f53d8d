import pytest
import torch

from ws_algorithm.recipes.data.synthetic_images import build_synthetic_images_dataspec

from .sources import dataset_of, everything


def test_images_have_the_channels_and_the_size_that_are_asked_for():
    spec = build_synthetic_images_dataspec(12, 4, in_channels=1, num_images=6, batch_size=3, training=False)
    images, labels = everything(spec)

    assert images.shape == (6, 1, 12, 12)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert dataset_of(spec).classes == ["0", "1", "2", "3"]


def test_there_is_a_full_batch_however_few_images_are_asked_for():
    spec = build_synthetic_images_dataspec(4, 2, num_images=1, batch_size=300, training=True)

    assert [len(labels) for _, labels in spec.dataloader] == [300]


def test_worker_processes_have_the_same_images():
    alone, helped = (
        everything(build_synthetic_images_dataspec(8, 3, num_images=10, batch_size=4, training=False, num_workers=n))
        for n in (0, 2)
    )

    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])


@pytest.mark.parametrize("name", ["image_size", "num_classes", "in_channels", "num_images"])
def test_numbers_must_be_positive(name):
    arguments = {"image_size": 4, "num_classes": 2, name: 0}

    with pytest.raises(ValueError, match=rf"`{name}` \(=0\) must be at least 1"):
        build_synthetic_images_dataspec(**arguments, batch_size=2, training=True)
