"""Optimizers, and wrappers that know the parameters, before and after the GroupNorm surgery."""

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import apply_group_normalization

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)


def network(norm: Any = nn.BatchNorm2d) -> Any:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1), norm(4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(IMAGES) * IMAGES[:, :1, 1:4, 1:4]).square().sum().backward()
    optimizer.step()


def parameters_of_norms(model: Any) -> list[Any]:
    return [parameter for place in (1, 4) for parameter in model[place].parameters()]


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_was_built_before_trains_the_group_norms(name, steps_before):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(steps_before):
        step(model, optimizer)

    assert apply_group_normalization(model, 2) == 2
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(model, optimizer)

    assert all(isinstance(model[place], nn.GroupNorm) for place in (1, 4))
    moved = [not torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True)]
    assert moved == [True] * 8


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_was_remembered_of_reset_parameters_is_forgotten(name, as_list):
    model = network()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name]([nn.Parameter(torch.ones(1))])
    step(model, optimizer)
    kept = {id(parameter) for place in (0, 3) for parameter in model[place].parameters()}

    apply_group_normalization(model, 2, optimizers=[other, optimizer] if as_list else optimizer)

    assert {id(parameter) for parameter in optimizer.state} == kept
    fresh = network()
    apply_group_normalization(fresh, 2)
    fresh.load_state_dict(model.state_dict())
    unused = OPTIMIZERS[name](fresh.parameters())
    step(model, optimizer)
    step(fresh, unused)
    for actual, expected in zip(parameters_of_norms(model), parameters_of_norms(fresh), strict=True):
        assert torch.equal(actual, expected)


def test_what_was_remembered_of_kept_values_is_kept():
    model = network()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    step(model, optimizer)

    apply_group_normalization(model, 2, copy_affine=True, optimizers=optimizer)

    assert len(optimizer.state) == 8


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_parameters_of_frozen_batch_norms_go_into_the_only_group(name, as_list, caplog):
    model = network(FrozenBatchNorm2d)
    optimizer = OPTIMIZERS[name](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(model, optimizer)

    assert apply_group_normalization(model, 2, optimizers=[optimizer] if as_list else optimizer) == 2

    (group,) = optimizer.param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in model.parameters()}
    before = [parameter.detach().clone() for parameter in parameters_of_norms(model)]
    step(model, optimizer)
    schedule.step()
    assert not any(torch.equal(a, b) for a, b in zip(parameters_of_norms(model), before, strict=True))
    assert not caplog.records


@pytest.mark.skipif(torch.__version__ < "2.6", reason="optimizers know names from torch 2.6 on")
def test_new_parameters_have_names_in_an_optimizer_that_knows_names():
    model = network(FrozenBatchNorm2d)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)

    apply_group_normalization(model, 2, optimizers=optimizer)

    (group,) = optimizer.param_groups
    named = dict(model.named_parameters())
    assert sorted(group["param_names"]) == sorted(named)
    assert all(named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize("several", ["groups", "optimizers"])
def test_new_parameters_without_one_place_are_refused(several):
    model = network(FrozenBatchNorm2d)
    parts = [list(model[place].parameters()) for place in (0, 3)]
    optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
    if several == "groups":
        optimizers = [torch.optim.SGD([{"params": part} for part in parts], lr=0.1)]

    with pytest.raises(ValueError, match=r"2 parameter groups.* 1, 4 .*Build the optimizer after"):
        apply_group_normalization(model, 2, optimizers=optimizers)

    assert isinstance(model[1], FrozenBatchNorm2d) and isinstance(model[4], FrozenBatchNorm2d)
    assert sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups) == 4
    assert apply_group_normalization(network(), 2, optimizers=optimizers) == 2  # no new parameters


def test_new_parameters_without_optimizers_are_warned_about(caplog):
    apply_group_normalization(network(FrozenBatchNorm2d), 2)

    (record,) = caplog.records
    assert record.getMessage().startswith("1, 4: GroupNorms have parameters, which FrozenBatchNorm2d has not. Build")


@pytest.mark.usefixtures("process_group")
def test_a_model_under_ddp_trains_as_one_without():
    plain = network()
    wrapped = DistributedDataParallel(network())
    wrapped.module.load_state_dict(plain.state_dict())

    for model in (plain, wrapped):
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        step(model, optimizer)
        assert apply_group_normalization(model, 2, optimizers=optimizer) == 2
        step(model, optimizer)

    for actual, expected in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("process_group")
def test_new_parameters_under_ddp_are_refused():
    wrapped = DistributedDataParallel(network(FrozenBatchNorm2d))

    with pytest.raises(ValueError, match="would not average the gradients of new parameters"):
        apply_group_normalization(wrapped, 2)

    assert isinstance(wrapped.module[1], FrozenBatchNorm2d)


@pytest.mark.usefixtures("process_group")
def test_a_model_under_fsdp_is_refused():
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = network()
    fully_shard(model, mesh=mesh)

    with pytest.raises(ValueError, match="under FSDP.*before wrapping"):
        apply_group_normalization(model, 2)

    assert isinstance(model[1], nn.BatchNorm2d)
