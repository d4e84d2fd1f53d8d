from collections import Counter
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from .sources import build, dataset_of, everything


def multiset(images: Tensor, labels: Tensor) -> Counter[bytes]:
    rows = torch.cat([(16 * images).round().flatten(1), labels[:, None]], dim=1).to(torch.uint8)
    return Counter(bytes(row.tolist()) for row in rows)


def digits_in(split: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1 and labels, before normalization."""
    dataset = dataset_of(build("digits", split, **options))
    return dataset.images, dataset.labels


def test_digits_are_split_without_overlap_or_loss():
    parts = multiset(*digits_in("train")) + multiset(*digits_in("test"))
    pixels, labels = load_digits(return_X_y=True)

    assert parts == multiset(torch.tensor(pixels / 16), torch.tensor(labels))


def test_digits_are_split_the_same_way_for_every_seed():
    for split in ("train", "test"):
        (images, labels), (again, again_labels) = digits_in(split, seed=0), digits_in(split, seed=7, training=True)
        assert torch.equal(images, again) and torch.equal(labels, again_labels)


def test_digits_are_split_within_each_class():
    everyone = torch.cat([digits_in("train")[1], digits_in("test")[1]]).bincount()
    tested = digits_in("test")[1].bincount()

    # 360 of 1,797, which is a fifth of each class to the nearest image
    assert ((tested - everyone * 360 / 1797).abs() < 1).all()


def test_digits_are_normalized_over_the_training_images():
    train, test = digits_in("train")[0], digits_in("test")[0]
    mean, std = train.double().mean(), train.double().std()

    found = everything(build("digits", "train"))[0].double()
    torch.testing.assert_close((found.mean(), found.std()), (torch.zeros_like(mean), torch.ones_like(std)))
    torch.testing.assert_close(everything(build("digits", "test"))[0], ((test.double() - mean) / std).float())


def test_digits_are_shifted_by_a_pixel_at_most():
    torch.manual_seed(0)
    shifted = everything(build("digits", "train", batch_size=100, training=True))[0][:200]
    still = everything(build("digits", "train", batch_size=100, training=True, augment=False))[0][:200]

    background = still.min()  # a pixel of value 0, normalized
    padded = torch.nn.functional.pad(still, (1, 1, 1, 1), value=float(background))
    shifts = [padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    matches = torch.stack([torch.isclose(shifted, shift, atol=1e-6).all(dim=(1, 2, 3)) for shift in shifts])

    assert matches.any(dim=0).all()  # each image is one of its nine shifts
    assert matches.any(dim=1).all()  # and each shift occurs
