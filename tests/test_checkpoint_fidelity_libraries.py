"""Checkpoints of BiT, timm and Composer's own Weight Standardization keep their outputs, to and fro."""

from functools import partial
from pathlib import Path
from typing import Any

import composer.algorithms
import pytest
import timm
import torch
from composed_runs import prepare
from composer.models import ComposerClassifier
from converted_networks import (
    GN,
    TOLERANCE,
    as_expected_by,
    classifier,
    converted_file,
    count_standardized,
    loaded,
    relative_error,
)
from sources import big_transfer
from sources.image_inputs import half_and_half
from sources.random_weights import random_network
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from ws_algorithm import plain_state_dict


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def without_own_standardization(name: str, num_classes: int) -> nn.Module:
    """timm's network with plain convolutions in place of those that standardize their own weight."""
    network = timm.create_model(name, num_classes=num_classes)
    for parent in list(network.modules()):
        for child, conv in list(parent.named_children()):
            if isinstance(conv, StdConv2d):
                shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
                setattr(parent, child, nn.Conv2d(*shape, bias=False))  # pyright: ignore[reportArgumentType]
    return network


@pytest.mark.parametrize("name, convolutions", [("resnetv2_50x1_bit", 53), ("resnetv2_101x1_bit", 104)])
def test_a_network_of_timm_there_and_back(tmp_path, images, name, convolutions):
    theirs: Any = random_network(partial(timm.create_model, name, num_classes=100))
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    expected = theirs.double()(half_and_half(images))

    converted = converted_file(tmp_path / f"{name}.pth", name)
    ours = loaded(partial(without_own_standardization, name, 100), converted)

    assert converted.source == "timm"
    assert len(theirs.state_dict()) == len(converted.state_dict)
    assert count_standardized(ours) == convolutions
    assert relative_error(ours(as_expected_by(converted, images)), expected) <= TOLERANCE

    with torch.device("meta"):
        anew = timm.create_model(name, num_classes=100).eval()
    anew.load_state_dict(plain_state_dict(ours), strict=True, assign=True)
    assert torch.equal(anew(half_and_half(images)), expected)


@pytest.mark.parametrize("save", [big_transfer.save_arrays, big_transfer.save_fine_tuned])
def test_a_network_of_big_transfer(tmp_path, images, save):
    theirs: Any = random_network(big_transfer.ResNetV2)
    path = tmp_path / ("BiT-M-R50x1.npz" if save is big_transfer.save_arrays else "bit.pth.tar")
    save(theirs, path)

    converted = converted_file(path, "resnetv2_50x1_bit")
    ours = loaded(partial(without_own_standardization, "resnetv2_50x1_bit", 1000), converted)

    assert (converted.source, converted.formula) == ("big_transfer", "bit")
    assert len(theirs.state_dict()) == len(converted.state_dict)
    assert count_standardized(ours) == 53
    assert relative_error(ours(as_expected_by(converted, images)), theirs.double()(half_and_half(images))) <= TOLERANCE


# A ResNet-50 has 53 convolutions and 161 tensors; each of its norms has 3 tensors more if it is a BatchNorm
@pytest.mark.parametrize("norm, ignored, tensors", [(GN, 0, 161), (nn.BatchNorm2d, 2, 161 + 3 * 53)])
def test_a_checkpoint_of_composers_own_weight_standardization(tmp_path, images, norm, ignored, tensors):
    network: Any = random_network(lambda: classifier("resnet50", norm))
    theirs: Any = ComposerClassifier(network, num_classes=1000)
    _train_a_step(theirs, composer.algorithms.WeightStandardization(ignored), tmp_path)

    converted = converted_file(tmp_path / "ep0-ba1-rank0.pt", "resnet50")
    ours = loaded(lambda: classifier("resnet50", norm), converted)

    assert (converted.source, converted.formula) == ("composer", "composer")
    assert len(converted.state_dict) == tensors
    assert count_standardized(ours) == 53 - ignored
    assert relative_error(ours(images), theirs.module.double().eval()(images)) <= TOLERANCE


@torch.enable_grad()
def _train_a_step(model: Any, algorithm: Any, folder: Path) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    saving: dict[str, Any] = {"save_folder": str(folder), "save_interval": "1ba"}
    trainer = prepare(model, [algorithm], optimizers=optimizer, max_duration="1ba", **saving)
    trainer.fit()
    trainer.close()
