"""Which convolutions the algorithm chooses after others have operated on the model."""

import copy
from typing import Any

import pytest
import torchvision
from composed_runs import SEED, bottlenecks, prepare, standardizable, standardized
from composer.algorithms import BlurPool, StochasticDepth
from composer.functional import apply_blurpool
from composer.models import ComposerClassifier
from torch import nn

from ws_algorithm import WeightStandardization, apply_weight_standardization


@pytest.fixture(scope="module")
def resnet50() -> Any:
    return ComposerClassifier(torchvision.models.resnet50(), num_classes=1000)


@pytest.mark.parametrize("layers", ["all", "normalized"])
@pytest.mark.parametrize("seed", range(10))
def test_stochastic_depth_hides_no_convolution(seed, layers, resnet50):
    method = ["block", "sample"][seed % 3 == 2]
    depth = StochasticDepth("ResNetBottleneck", method, drop_rate=0.5, drop_distribution="uniform")
    ws = WeightStandardization(layers=layers)
    model = copy.deepcopy(resnet50)

    prepare(model, [depth, ws] if seed % 2 else [ws, depth], seed=SEED + seed)

    assert len(standardized(model)) == len(standardizable(model)) == 53


def with_head() -> Any:
    """A network with strides whose last convolution predicts, without a normalization behind it."""
    body = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(16, 16, 3, stride=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)]
    return ComposerClassifier(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()), num_classes=2)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "build, last", [(bottlenecks, "module.layer4.0.downsample.0.conv"), (with_head, "module.7")], ids=["body", "head"]
)
def test_blurpool_and_the_last_normalized_convolution(build, last, place):
    algorithms: list[Any] = [BlurPool()]
    algorithms.insert(place, WeightStandardization(n_last_layers_ignore=1, layers="normalized"))
    model, by_hand = build(), build()
    apply_blurpool(by_hand)

    prepare(model, algorithms)

    every = set(standardizable(by_hand))
    assert last in every and any(name.endswith(".conv") for name in every)
    assert standardized(model) == every - {last}
    assert apply_weight_standardization(by_hand, 1, layers="normalized") == len(every) - 1
    assert standardized(by_hand) == standardized(model)
