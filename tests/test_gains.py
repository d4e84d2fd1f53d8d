"""Gains that learn, and optimizers and wrappers that knew the parameters before the gains came."""

import logging
from typing import Any

import pytest
import torch
from small_models import put_a_class_in_front
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ws_algorithm import apply_weight_standardization, is_weight_standardized, standardize_once
from ws_algorithm.parametrization import raw_weight

IMAGES = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


def network() -> Any:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


def gains(model: Any) -> list[Any]:
    return [model[place].parametrizations.weight[1].gain for place in (0, 2)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    with standardize_once(model):
        for image in IMAGES.split(1):
            (model(image) - 1).square().sum().backward()
    optimizer.step()


def test_gains_join_the_parameter_group_of_their_weight():
    model = network()
    groups = [{"params": model[place].parameters(), "lr": rate} for place, rate in ((0, 0.1), (2, 0.2))]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer)

    apply_weight_standardization(model, formula="scaled", optimizers=optimizer)

    assert [group["params"][-1] is gain for group, gain in zip(optimizer.param_groups, gains(model), strict=True)]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    before = [gain.detach().clone() for gain in gains(model)]
    step(model, optimizer)
    schedule.step()
    for gain, start, rate in zip(gains(model), before, (0.1, 0.2), strict=True):
        torch.testing.assert_close(gain, start - rate * gain.grad)


def test_gains_learn_what_autograd_says():
    models = [network().double() for _ in range(2)]
    for model in models:
        apply_weight_standardization(model, formula="scaled", optimizers=[])

    for image in IMAGES.double().split(1):
        (models[0](image) - 1).square().sum().backward()
    with standardize_once(models[1]):
        for image in IMAGES.double().split(1):
            (models[1](image) - 1).square().sum().backward()

    for exact, once in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(once.grad, exact.grad, rtol=1e-12, atol=1e-12)
    assert all(bool(gain.grad.abs().sum() > 0) for gain in gains(models[1]))


@pytest.mark.skipif(torch.__version__ < "2.6", reason="optimizers know names from torch 2.6 on")
def test_gains_have_names_in_an_optimizer_that_knows_names():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)

    apply_weight_standardization(model, formula="scaled", optimizers=[optimizer])

    (group,) = optimizer.param_groups
    assert group["param_names"][-2:] == [f"{place}.parametrizations.weight.1.gain" for place in (0, 2)]
    assert all(gain is parameter for gain, parameter in zip(gains(model), group["params"][-2:], strict=True))


def test_the_gain_of_a_frozen_weight_is_frozen_and_one_that_no_optimizer_knows_stays_out():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)

    apply_weight_standardization(model, formula="scaled", optimizers=optimizer)

    assert [gain.requires_grad for gain in gains(model)] == [False, True]
    assert [gains(model)[0] is p for p in optimizer.param_groups[0]["params"]] == [False, False, True]


@pytest.mark.parametrize("formula, told", [("scaled", 1), ("affine", 0), ("composer", 0)])
def test_new_parameters_are_told_unless_optimizers_are_given(formula, told, caplog):
    with caplog.at_level(logging.WARNING):
        apply_weight_standardization(network(), formula=formula, layers="all", exclude="2")
        warnings = [record for record in caplog.records if "`optimizers`" in record.getMessage()]
        caplog.clear()
        apply_weight_standardization(network(), formula=formula, optimizers=[])

    assert len(warnings) == told
    assert not any("`optimizers`" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("optimizers", [3, ["SGD"], nn.Conv2d(1, 1, 1)], ids=["number", "names", "module"])
def test_what_is_no_optimizer_is_refused(optimizers):
    model = network()

    with pytest.raises(ValueError, match="`optimizers`"):
        apply_weight_standardization(model, formula="scaled", optimizers=optimizers)

    assert not is_weight_standardized(model)


@pytest.mark.usefixtures("process_group")
def test_under_distributed_data_parallel():
    wrapped = DistributedDataParallel(network())
    with pytest.raises(ValueError, match="DistributedDataParallel, which would not average"):
        apply_weight_standardization(wrapped, formula="scaled", optimizers=[])
    assert not is_weight_standardized(wrapped)
    assert apply_weight_standardization(wrapped, formula="affine") == 2

    model, alone = network(), network()
    for net in (model, alone):
        apply_weight_standardization(net, formula="scaled", optimizers=[])
    parallel = DistributedDataParallel(model)
    for net in (parallel, alone):
        step(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for actual, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("formula, count", [("affine", 0), ("scaled", 0), ("paper", 2)])
def test_under_fsdp(formula, count):
    model = network()

    class FSDPModule:
        pass

    model.__class__ = type("FSDPSequential", (FSDPModule, nn.Sequential), {})
    if count == 0:
        with pytest.raises(ValueError, match="`module` is under FSDP"):
            apply_weight_standardization(model, formula=formula)
        assert not is_weight_standardized(model)
    else:
        assert apply_weight_standardization(model, formula=formula) == count


def test_a_class_put_in_front_afterwards():
    model = network()
    apply_weight_standardization(model, formula="affine")
    put_a_class_in_front(model[0])
    plain = network()
    weight = torch.randn(4, 3, 3, 3)
    with torch.no_grad():
        plain[0].weight.copy_(weight)

    model.load_state_dict(plain.state_dict())

    torch.testing.assert_close(model[0].weight, weight, rtol=1e-5, atol=1e-6)
    model.load_state_dict(network().state_dict())
    torch.testing.assert_close(model[0].weight, raw_weight(model[0]), rtol=1e-5, atol=1e-6)
