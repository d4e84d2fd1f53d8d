"""GroupNorms in the place of batch norms: what they compute, what they keep, and the rule for groups."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import apply_group_normalization

LAYERS: dict[str, Any] = {
    "BatchNorm1d": nn.BatchNorm1d,
    "BatchNorm2d": nn.BatchNorm2d,
    "BatchNorm3d": nn.BatchNorm3d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
}


class Residual(nn.Module):
    """A norm of two names in one parent, which another parent has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.alias = self.norm
        self.other = nn.Sequential(nn.ReLU(), self.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.other(self.norm(x))


def values_set(layer: Any) -> Any:
    """The layer with values of its own in all parameters and buffers."""
    with torch.no_grad():
        for number, value in enumerate([layer.weight, layer.bias, layer.running_mean, layer.running_var], start=2):
            value.uniform_(number, number + 1)
    return layer


def replaced(layer: nn.Module, *arguments: Any, **rules: Any) -> Any:
    """What stands in the place of a layer."""
    model = nn.Sequential(layer)
    assert apply_group_normalization(model, *arguments, **rules) == 1
    return model[0]


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_batch_norm_is_replaced(name):
    layer = replaced(LAYERS[name](8), 4, eps=1e-3)

    assert type(layer) is nn.GroupNorm
    assert (layer.num_groups, layer.num_channels, layer.eps, layer.affine) == (4, 8, 1e-3, True)
    assert dict(layer.named_buffers()) == {}


@pytest.mark.parametrize("copy_affine", [False, True])
@pytest.mark.parametrize(
    "name, shape",
    [
        ("BatchNorm1d", (5, 8)),
        ("BatchNorm1d", (5, 8, 6)),
        ("BatchNorm2d", (2, 8, 3, 4)),
        ("BatchNorm3d", (2, 8, 3, 4, 2)),
        ("FrozenBatchNorm2d", (2, 8, 3, 4)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_that_of_the_formula(name, shape, copy_affine, training):
    old = values_set(LAYERS[name](8).double()).train(training)
    scale = old.weight.detach().clone() if copy_affine else torch.ones(8).double()
    shift = old.bias.detach().clone() if copy_affine else torch.zeros(8).double()
    x = torch.randn(shape, dtype=torch.float64)

    y = replaced(old, 4, copy_affine=copy_affine, eps=1e-4)(x)

    groups = x.reshape(shape[0], 4, -1)  # (N, G, all that belongs to a group)
    mean, var = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, correction=0)
    normalized = ((groups - mean) / (var + 1e-4).sqrt()).reshape(shape[0], 8, -1)
    assert_close(y, (normalized * scale[:, None] + shift[:, None]).reshape(shape))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "FrozenBatchNorm2d"])
def test_parameters_remain_the_same_objects_with_values_1_and_0(name):
    old = values_set(LAYERS[name](8))
    weight, bias = old.weight, old.bias

    new = replaced(old, 4)

    assert new.weight is weight and new.bias is bias
    assert torch.equal(weight, torch.ones(8)) and torch.equal(bias, torch.zeros(8))


@pytest.mark.parametrize("name", LAYERS)
def test_copy_affine_keeps_the_values(name):
    old = values_set(LAYERS[name](8))
    weight, bias = old.weight.detach().clone(), old.bias.detach().clone()

    new = replaced(old, 4, copy_affine=True)

    assert torch.equal(new.weight, weight) and torch.equal(new.bias, bias)
    assert [name for name, _ in new.named_parameters()] == ["weight", "bias"]


def test_a_frozen_batch_norm_gets_parameters_of_its_own():
    old = values_set(FrozenBatchNorm2d(8).double())
    before = copy.deepcopy(old.state_dict())

    new = replaced(old, 4)

    assert torch.equal(new.weight, torch.ones(8).double()) and torch.equal(new.bias, torch.zeros(8).double())
    assert new.weight.requires_grad and new.bias.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in old.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_device_and_dtype_are_kept(name, dtype):
    new = replaced(LAYERS[name](8).to(dtype=dtype, device="meta"), 4)

    assert {(p.dtype, p.device.type) for p in new.parameters()} == {(dtype, "meta")}


@pytest.mark.parametrize("name", ["BatchNorm2d", "SyncBatchNorm"])
def test_no_affine_stays_no_affine(name):
    new = replaced(LAYERS[name](8, affine=False), 4)

    assert (new.affine, new.weight, new.bias) == (False, None, None)


def test_a_missing_shift_stays_missing():
    old = nn.BatchNorm2d(8)
    old.register_parameter("bias", None)

    new = replaced(old, 4)

    assert new.bias is None and new.weight is old.weight
    assert new(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_and_what_is_frozen_are_kept(training):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)).train(training)
    model[0].weight.requires_grad_(False)

    apply_group_normalization(model, 4)

    assert [layer.training for layer in model] == [training, training]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_a_norm_with_several_names_and_parents_is_replaced_by_one():
    model = Residual()

    assert apply_group_normalization(model, 4) == 1

    assert type(model.norm) is nn.GroupNorm
    assert model.alias is model.norm and model.other[1] is model.norm
    assert model(torch.randn(1, 8, 2, 2)).shape == (1, 8, 2, 2)


def test_shared_parameters_stay_shared():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight

    assert apply_group_normalization(model, 4) == 2

    assert model[0] is not model[1] and model[0].weight is model[1].weight
    assert len(list(model.parameters())) == 3


def test_hooks_on_forward_and_backward_go_on_and_can_be_removed():
    old, calls = nn.BatchNorm2d(8), []
    handles = [
        old.register_forward_pre_hook(lambda layer, args: calls.append(("pre", type(layer)))),
        old.register_forward_hook(lambda layer, args, kwargs, y: calls.append(("hook", kwargs)), with_kwargs=True),
        old.register_full_backward_hook(lambda layer, into, out: calls.append(("backward", len(out)))),
    ]
    new = replaced(old, 4)

    new(torch.randn(2, 8, 3, 3, requires_grad=True)).sum().backward()
    assert calls == [("pre", nn.GroupNorm), ("hook", {}), ("backward", 1)]

    for handle in handles:
        handle.remove()
    new(torch.randn(2, 8, 3, 3)).sum().backward()
    assert len(calls) == 3


def test_applying_twice_equals_applying_once():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    assert apply_group_normalization(model, 4, include="1") == 1
    once, state = model[1], copy.deepcopy(model.state_dict())
    assert apply_group_normalization(model, 2, include="1") == 0

    assert model[1] is once and once.num_groups == 4
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("as_channels_per_group", [False, True])
@given(channels=st.integers(1, 300), wanted=st.integers(1, 40))
@example(channels=64, wanted=32)
@example(channels=31, wanted=32)
def test_the_largest_divisor_is_taken(as_channels_per_group, channels, wanted):
    rules: Any = {"channels_per_group": wanted} if as_channels_per_group else {"num_groups": wanted}
    layer = replaced(nn.BatchNorm2d(channels, device="meta"), indivisible="largest_divisor", **rules)

    divisors = {d for d in range(1, channels + 1) if channels % d == 0}
    taken = channels // layer.num_groups if as_channels_per_group else layer.num_groups
    assert layer.num_channels == channels
    assert taken in divisors and taken <= wanted
    assert not any(taken < divisor <= wanted for divisor in divisors)


def test_channels_per_group():
    model = nn.Sequential(nn.BatchNorm2d(32), nn.BatchNorm2d(48))

    apply_group_normalization(model, channels_per_group=16)

    assert [layer.num_groups for layer in model] == [2, 3]
