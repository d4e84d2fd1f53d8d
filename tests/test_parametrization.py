"""The life of one standardized convolution, from registration to removal."""

import copy
from typing import Any

import pytest
import torch
from small_models import KINDS, put_a_class_in_front, standardized
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close

from ws_algorithm.formula import Formula, standardize_weight
from ws_algorithm.functional import fold_weight_standardization, is_weight_standardized, remove_weight_standardization
from ws_algorithm.parametrization import (
    WeightStandardizer,
    raw_weight,
    register_weight_standardizer,
    unregister_weight_standardizer,
)

RAW_KEY = "parametrizations.weight.original"
kinds = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


@kinds
def test_whole_life(build):
    conv = build()
    cls, weight, keys = type(conv), conv.weight, list(conv.state_dict())
    parameters, values = [id(p) for p in conv.parameters()], weight.detach().clone()

    register_weight_standardizer(conv)

    assert isinstance(conv, cls) and type(conv).__name__ == f"Parametrized{cls.__name__}"
    assert parametrize.is_parametrized(conv, "weight")
    assert is_weight_standardized(conv)
    assert raw_weight(conv) is weight
    assert set(conv.state_dict()) == {RAW_KEY if key == "weight" else key for key in keys}
    assert {id(p) for p in conv.parameters()} == set(parameters)
    assert torch.equal(weight, values)
    assert torch.equal(conv.weight, standardize_weight(values))

    optimizer = torch.optim.SGD([weight], lr=0.5)
    conv.weight.pow(3).sum().backward()
    optimizer.step()

    assert torch.equal(weight, values - 0.5 * weight.grad)
    assert torch.equal(conv.weight, standardize_weight(weight))

    trained = weight.detach().clone()
    assert unregister_weight_standardizer(conv) is weight

    assert type(conv) is cls
    assert conv.weight is weight and torch.equal(weight, trained)
    assert list(conv.state_dict()) == keys
    assert [id(p) for p in conv.parameters()] == parameters
    assert not hasattr(conv, "parametrizations") and not is_weight_standardized(conv)


def test_an_optimizer_from_before_trains_the_same_as_one_from_after():
    before, after = KINDS["Conv2d"](), KINDS["Conv2d"]()
    after.load_state_dict(before.state_dict())
    optimizers = [torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)]
    register_weight_standardizer(before)
    register_weight_standardizer(after)
    optimizers.append(torch.optim.SGD(after.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))

    images = torch.randn(2, 4, 8, 8)
    for conv, optimizer in zip((before, after), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            conv(images).square().mean().backward()
            optimizer.step()

    assert torch.equal(raw_weight(before), raw_weight(after))
    assert torch.equal(before.bias, after.bias)


@kinds
@pytest.mark.parametrize("end", [fold_weight_standardization, remove_weight_standardization])
@pytest.mark.parametrize("which", ["copy", "original"])
def test_ending_one_of_two_deep_copies_leaves_the_other_intact(build, end, which):
    original = standardized(build)
    plain_class = type(build())
    pair = {"original": original, "copy": copy.deepcopy(original)}
    other = pair["copy" if which == "original" else "original"]
    raw, weight = raw_weight(other), other.weight.detach().clone()

    assert end(pair[which]) == 1

    assert type(pair[which]) is plain_class and isinstance(pair[which].weight, nn.Parameter)
    assert is_weight_standardized(other) and raw_weight(other) is raw
    assert torch.equal(other.weight, weight)
    other.reset_parameters()
    other.load_state_dict(pair[which].state_dict())
    assert torch.equal(raw_weight(other), pair[which].weight)
    assert end(other) == 1 and type(other) is plain_class


@pytest.mark.parametrize("end", [fold_weight_standardization, remove_weight_standardization])
def test_a_class_put_in_front_is_refused_at_the_end(end):
    model = nn.Sequential(standardized(), standardized())
    put_a_class_in_front(model[1])
    classes, state_dict = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())

    with pytest.raises(ValueError, match="class was replaced by FSDPParametrizedConv2d"):
        end(model)

    assert [type(m) for m in model.modules()] == classes
    assert_close(model.state_dict(), state_dict, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_convolution_is_that_of_all_its_parts(training):
    conv = KINDS["Conv2d"]().train(training)

    register_weight_standardizer(conv)

    assert {module.training for module in conv.modules()} == {training}


def test_the_mode_of_a_part_that_was_there_before_stays():
    conv = KINDS["Conv2d"]()
    conv.norm = nn.BatchNorm2d(6).eval()  # frozen, inside a layer in training mode

    register_weight_standardizer(conv)

    assert conv.training and not conv.norm.training


def test_beside_another_parametrization_torchs_own_rules_hold():
    conv: Any = parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    plain, keys, weight = nn.Conv2d(4, 6, 3), list(conv.state_dict()), conv.weight.detach()

    register_weight_standardizer(conv)

    cls = type(conv)
    assert list(conv.state_dict()) == keys
    assert_close(conv.weight, standardize_weight(weight))
    with pytest.raises(ValueError, match="other parametrizations.*_WeightNorm"):
        unregister_weight_standardizer(conv)
    with pytest.raises(RuntimeError, match=r'original0[\s\S]*Unexpected key.*"weight"'):
        conv.load_state_dict(plain.state_dict())
    conv.load_state_dict(conv.state_dict())
    conv.reset_parameters()
    assert_close(conv.weight, standardize_weight(weight))
    conv.weight = plain.weight.detach()  # through the inverse of weight_norm
    assert_close(conv.weight, standardize_weight(plain.weight))
    assert type(conv) is cls and is_weight_standardized(conv)


def test_a_parametrized_bias_stays():
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    conv: Any = parametrize.register_parametrization(nn.Conv2d(4, 6, 3), "bias", Doubled())
    bias, keys, images = conv.bias, list(conv.state_dict()), torch.randn(1, 4, 8, 8)
    before = conv(images)

    register_weight_standardizer(conv)
    unregister_weight_standardizer(conv)

    assert torch.equal(conv.bias, bias) and list(conv.state_dict()) == keys
    assert torch.equal(conv(images), before)


def test_the_module_by_itself():
    linear = nn.Linear(5, 3)
    weight = linear.weight
    formula = Formula(eps=0.1, eps_inside_root=True, unbiased=False)

    parametrize.register_parametrization(linear, "weight", WeightStandardizer(formula))

    assert torch.equal(linear.weight, standardize_weight(weight, formula))
    assert is_weight_standardized(linear)
    assert remove_weight_standardization(linear) == 1 and linear.weight is weight


@pytest.mark.parametrize(
    "formula, text",
    [
        ("paper", "WeightStandardizer(formula='paper')"),
        (
            Formula(eps=0.1, eps_inside_root=True, unbiased=False),
            "WeightStandardizer(formula=Formula(eps=0.1, eps_inside_root=True, unbiased=False, rescaling=None))",
        ),
    ],
)
def test_repr(formula, text):
    assert repr(WeightStandardizer(formula)) == text


def test_unknown_formula():
    with pytest.raises(ValueError, match="`formula`"):
        WeightStandardizer("batch_norm")
