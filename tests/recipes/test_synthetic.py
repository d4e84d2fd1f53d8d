import pytest
import torch
from composer.utils import dist
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.recipes.synthetic import SyntheticImages


@given(st.integers(1, 5), st.integers(1, 60), st.integers(0, 2**40))
def test_an_image_is_the_same_whenever_it_is_asked_for(num_classes, num_images, seed):
    first, second = (
        SyntheticImages((2, 3, 5), ["c"] * num_classes, batch_size=1, seed=seed, num_images=num_images)
        for _ in range(2)
    )

    backwards = [second[i] for i in reversed(range(num_images))][::-1]
    for i in range(num_images):
        assert torch.equal(first[i][0], backwards[i][0])
        assert first[i][1] == backwards[i][1] == i % num_classes  # no class has two images more than another


def test_images_differ_from_one_another_and_from_those_of_another_seed():
    images = torch.stack([image for image, _ in SyntheticImages((3, 8, 8), ["a"], batch_size=1, seed=0)])
    others = torch.stack([image for image, _ in SyntheticImages((3, 8, 8), ["a"], batch_size=1, seed=1)])

    assert len(images) == len(images.unique(dim=0)) == 256
    assert len(torch.cat([images, others]).unique(dim=0)) == 512


def test_images_are_of_zero_mean_and_unit_variance():
    images = torch.stack([image for image, _ in SyntheticImages((3, 32, 32), ["a"], batch_size=1, seed=0)])

    # 98,304 independent numbers: standard errors of 0.003 and 0.002
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02


def test_every_process_has_a_full_batch(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)

    assert len(SyntheticImages((1, 2, 2), ["a"], batch_size=100, seed=0)) == 400
    assert len(SyntheticImages((1, 2, 2), ["a"], batch_size=10, seed=0)) == 256


@pytest.mark.parametrize("position", [-1, 256])
def test_there_are_no_images_beyond_the_last(position):
    with pytest.raises(IndexError, match=f"{position} is not a position among 256 images"):
        SyntheticImages((1, 2, 2), ["a"], batch_size=1, seed=0)[position]
