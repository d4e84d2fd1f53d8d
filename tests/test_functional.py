"""Standardizing a whole model and taking it off again."""

import logging
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from composer.functional import apply_weight_standardization as composers_apply
from gain_and_shift import gain_and_shift
from small_models import Net, conv, defined_in_reverse
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from ws_algorithm import (
    FORMULAS,
    Formula,
    apply_weight_standardization,
    fold_weight_standardization,
    is_weight_standardized,
    remove_weight_standardization,
    standardize_weight,
)


def small_model() -> Any:
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
    head = nn.Conv2d(4, 3, 1)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), block, nn.ConvTranspose2d(8, 4, 2), head)


def standardized_names(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if parametrize.is_parametrized(layer, "weight")]


def everything(model: nn.Module) -> tuple:
    tensors = model.state_dict(keep_vars=True).items()
    values = [(key, id(t), None if is_lazy(t) else t.tolist()) for key, t in tensors]
    return values, [(name, type(m), m.training) for name, m in model.named_modules()]


def test_apply_counts_and_is_idempotent():
    model = small_model()
    weights = [model[0].weight, model[3][0].weight, model[5].weight]

    assert not is_weight_standardized(model)
    assert apply_weight_standardization(model) == 3
    assert standardized_names(model) == ["0", "3.0", "5"]
    assert is_weight_standardized(model) and is_weight_standardized(model[3]) and not is_weight_standardized(model[1])
    before = everything(model)

    assert apply_weight_standardization(model) == 0

    assert everything(model) == before
    assert [id(p) for p in model.parameters() if any(p is w for w in weights)] == [id(w) for w in weights]
    for layer, raw in zip((model[0], model[3][0], model[5]), weights, strict=True):
        assert len(layer.parametrizations["weight"]) == 1
        assert torch.equal(layer.weight, standardize_weight(raw))


def test_apply_again_with_fewer_ignored_adds_the_rest():
    model = defined_in_reverse()

    assert [apply_weight_standardization(model, n) for n in (2, 2, 1, 0, 0)] == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("n, names", [(0, ["head", "body", "stem"]), (1, ["body", "stem"]), (2, ["stem"]), (3, [])])
def test_the_last_executed_are_left_out(n, names):
    model = defined_in_reverse()

    assert apply_weight_standardization(model, n_last_layers_ignore=n) == len(names)
    assert standardized_names(model) == names


@pytest.mark.parametrize("formula", [*FORMULAS, Formula(eps=0.1, eps_inside_root=False, unbiased=True)], ids=str)
def test_formula(formula):
    model = small_model()
    raw = model[0].weight

    apply_weight_standardization(model, formula=formula)

    assert torch.equal(model[0].weight, standardize_weight(raw, formula, **gain_and_shift(model[0])))


def test_remove_restores_the_model():
    model = small_model()
    before = everything(model)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    apply_weight_standardization(model, 1)

    assert remove_weight_standardization(model) == 2

    assert everything(model) == before
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    assert remove_weight_standardization(model) == 0


def test_the_model_itself():
    model = nn.Conv1d(3, 4, 3)

    assert apply_weight_standardization(model) == 1 and is_weight_standardized(model)
    assert fold_weight_standardization(model) == 1 and not is_weight_standardized(model)
    assert apply_weight_standardization(model, 1) == 0 and not is_weight_standardized(model)


@pytest.mark.parametrize("n", [-1, True, False, 1.0, 1.5, None, "1", float("nan"), [1]], ids=repr)
def test_bad_counts(n):
    model = small_model()
    before = everything(model)

    with pytest.raises(ValueError, match=r"`n_last_layers_ignore` \(=.*\) must be a whole number of layers, 0 or more"):
        apply_weight_standardization(model, n)

    assert everything(model) == before


@pytest.mark.parametrize("n", [np.int64(1), np.uint8(1), np.array(1)], ids=lambda n: type(n).__name__)
def test_counts_of_numpy(n):
    assert apply_weight_standardization(small_model(), n) == 2


@pytest.mark.parametrize("formula", ["Composer", None, 1e-5], ids=repr)
def test_bad_formulas(formula):
    model = small_model()
    before = everything(model)

    with pytest.raises(ValueError, match="`formula`"):
        apply_weight_standardization(model, formula=formula)

    assert everything(model) == before


FUNCTIONS = [
    apply_weight_standardization,
    remove_weight_standardization,
    fold_weight_standardization,
    is_weight_standardized,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("module", [None, [nn.Conv2d(2, 2, 3)], torch.zeros(2, 2), len, nn.Conv2d], ids=repr)
def test_what_is_not_a_module(function, module):
    with pytest.raises(ValueError, match=r"`module` must be a torch.nn.Module, got"):
        function(module)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 2, 5, 5))])
def test_a_script_module(function, compile):
    with pytest.raises(ValueError, match="ScriptModule"):
        function(compile(conv()))


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lazy modules are a new feature")  # some versions of torch
        return nn.LazyConv2d(2, 3)


def pruned() -> nn.Module:
    return prune.random_unstructured(conv(), "weight", amount=0.5)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(conv())


def old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(conv())


def quantized() -> nn.Module:
    layer = conv()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize(
    "build, message",
    [
        (lazy, r"convolution, '1\.0', .*lazy.*Run one batch through the model first"),
        (pruned, r"convolution, '1\.0', .*prune\.remove"),
        (old_weight_norm, r"convolution, '1\.0', .*remove_weight_norm"),
        (old_spectral_norm, r"convolution, '1\.0', .*remove_spectral_norm"),
        (quantized, r"torch\.int8"),
    ],
)
def test_convolutions_that_cannot_be_standardized(build, message, n):
    model = nn.Sequential(conv(), nn.Sequential(build()), conv(), conv())
    before = everything(model)

    with pytest.raises(ValueError, match=message):
        apply_weight_standardization(model, n)

    assert everything(model) == before


def test_a_fan_in_of_one_keeps_working():
    model = nn.Sequential(conv(), nn.Conv2d(2, 2, 1, groups=2), conv())

    assert apply_weight_standardization(model) == 2
    assert standardized_names(model) == ["0", "2"]


@pytest.mark.parametrize("function", [remove_weight_standardization, fold_weight_standardization])
def test_another_parametrization_is_not_taken_off(function):
    model = nn.Sequential(conv(), parametrize.register_parametrization(conv(), "weight", nn.Tanh()))
    apply_weight_standardization(model)
    before = everything(model)

    with pytest.raises(ValueError, match="other parametrizations beside the standardization: Tanh"):
        function(model)

    assert everything(model) == before


def test_composers_own_is_known():
    model = small_model()
    raw = model[0].weight
    assert composers_apply(model) == 3

    assert is_weight_standardized(model)
    assert apply_weight_standardization(model) == 0 and len(model[0].parametrizations["weight"]) == 1
    assert remove_weight_standardization(model) == 3
    assert model[0].weight is raw and type(model[0]) is nn.Conv2d


def test_a_frozen_convolution_stays_frozen():
    model = small_model().requires_grad_(False)

    apply_weight_standardization(model)

    assert not any(p.requires_grad for p in model.parameters()) and not model[0].weight.requires_grad


def messages(caplog) -> list[tuple[str, str]]:
    taken = [(record.levelname, record.message) for record in caplog.records]
    caplog.clear()
    return taken


def test_log(caplog):
    caplog.set_level(logging.INFO, logger="ws_algorithm")
    model = Net({"head": conv(), "a": nn.Conv2d(2, 2, 1, groups=2), "b": conv(), "c": conv()}, ["a", "b", "c", "head"])
    fan_in_1 = "a (fan-in 1: the standardized weight would be 0)"

    def line(count: str, model: str, left_alone: str) -> str:
        return f"Weight Standardization: {count} convolutions of {model} standardized; left alone: {left_alone}."

    apply_weight_standardization(model, 5)
    assert messages(caplog) == [("WARNING", line("0 of 4", "Net", f"{fan_in_1}; b, c, head (n_last_layers_ignore=5)"))]
    apply_weight_standardization(model, 2)
    assert messages(caplog)[0] == ("INFO", line("1 of 4", "Net", f"{fan_in_1}; c, head (n_last_layers_ignore=2)"))
    apply_weight_standardization(model)
    assert messages(caplog)[0] == ("INFO", line("2 of 4", "Net", f"{fan_in_1}; b (already standardized)"))
    apply_weight_standardization(conv(), 1)
    assert messages(caplog) == [("WARNING", line("0 of 1", "Conv2d", "(the model itself) (n_last_layers_ignore=1)"))]
    apply_weight_standardization(nn.Linear(2, 2))
    assert messages(caplog) == [("WARNING", line("0 of 0", "Linear", "none"))]
    remove_weight_standardization(nn.Linear(2, 2))
    fold_weight_standardization(nn.Linear(2, 2))
    nothing = ("WARNING", "Linear has no standardized layer; nothing was removed or folded.")
    assert messages(caplog) == [nothing, nothing]
