"""What users of Composer's own Weight Standardization rely on."""

import logging
import warnings

import pytest
import torch
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.models import ComposerClassifier
from small_models import OnesConv
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from ws_algorithm import WeightStandardization, apply_weight_standardization


class TwoConvolutions(ComposerClassifier):
    """Each convolution has two names, and no normalization follows it."""

    module: nn.Sequential

    def __init__(self) -> None:
        conv1, conv2 = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3)
        body = [conv1, nn.Identity(), nn.ReLU(), conv2, nn.Identity(), nn.ReLU()]
        super().__init__(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), num_classes=2)
        self.conv1 = conv1
        self.conv2 = conv2


def run_on_init(algorithm: WeightStandardization, model: nn.Module) -> None:
    state = State(model=model, rank_zero_seed=0, run_name="run", device=DeviceCPU())
    algorithm.apply(Event.INIT, state, Logger(state))


def apply_by_function(model: nn.Module, n_last_layers_ignore: int) -> None:
    apply_weight_standardization(model, n_last_layers_ignore=n_last_layers_ignore)


def apply_by_algorithm(model: nn.Module, n_last_layers_ignore: int) -> None:
    run_on_init(WeightStandardization(n_last_layers_ignore=n_last_layers_ignore), model)


@pytest.mark.parametrize("apply", [apply_by_function, apply_by_algorithm])
@pytest.mark.parametrize("n, standardized", [(0, (True, True)), (1, (True, False)), (3, (False, False))])
def test_exactly_the_standardized_convolutions_are_parametrized(apply, n, standardized):
    model = TwoConvolutions()

    apply(model, n)

    assert tuple(parametrize.is_parametrized(conv, "weight") for conv in (model.conv1, model.conv2)) == standardized
    assert tuple(parametrize.is_parametrized(conv) for conv in (model.module[0], model.module[3])) == standardized
    others = [m for m in model.modules() if not isinstance(m, nn.Conv2d)]
    assert not any(parametrize.is_parametrized(module) for module in others)
    assert not any(parametrize.is_parametrized(conv, "bias") for conv in (model.conv1, model.conv2))


@pytest.mark.parametrize("apply", [apply_by_function, apply_by_algorithm])
def test_mean_0_and_variance_1_per_filter(apply):
    model = TwoConvolutions()

    apply(model, 0)

    for conv in (model.conv1, model.conv2):
        var, mean = torch.var_mean(conv.weight, dim=[1, 2, 3], correction=0)
        assert_close(mean, torch.zeros_like(mean))
        assert_close(var, torch.ones_like(var))


@pytest.mark.parametrize("n, count", [(0, 2), (1, 1), (2, 0), (3, 0)])
def test_the_count(n, count):
    assert apply_weight_standardization(TwoConvolutions(), n) == count


def test_the_parameters_are_trained_through_the_standardization():
    model = TwoConvolutions()
    raw = model.conv1.weight
    apply_weight_standardization(model)

    model((torch.randn(2, 3, 8, 8), torch.zeros(2))).sum().backward()

    assert raw.grad is not None and raw.grad.abs().sum() > 0
    assert raw in set(model.parameters())


@pytest.mark.parametrize("apply", [apply_by_function, apply_by_algorithm])
def test_nothing_left_to_standardize_is_logged_and_not_warned(apply, caplog):
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO, logger="ws_algorithm"):
        warnings.simplefilter("always")
        apply(TwoConvolutions(), 3)

    assert warned == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "0 of 2 convolutions" in record.message


def test_subclasses_count_too():
    class Model(TwoConvolutions):
        def __init__(self) -> None:
            super().__init__()
            self.conv2 = self.module[3] = OnesConv(8, 4, 3)

    model = Model()

    assert apply_weight_standardization(model, 1) == 1
    assert parametrize.is_parametrized(model.conv1) and not parametrize.is_parametrized(model.conv2)
