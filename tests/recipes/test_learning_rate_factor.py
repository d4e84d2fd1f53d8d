"""Groups of an optimizer whose learning rate is a multiple of its own, as the references have them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ws_algorithm import apply_weight_standardization
from ws_algorithm.recipes import build
from ws_algorithm.recipes.parameter_groups import parameter_groups
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW

# Detectron: norm parameters and biases without decay, the other biases twice as fast
DETECTRON = "[{params: norm, weight_decay: 0}, {params: bias, lr_factor: 2, weight_decay: 0}]"
# maskrcnn-benchmark: whatever is called bias, those of norms too; the scales of norms decay
MASKRCNN = "[{params: bias, lr_factor: 2, weight_decay: 0}]"


def optimizer_of(groups: str, *overrides: str) -> torch.optim.Optimizer:
    recipe = resolve_recipe("quickstart", [f"optimizers.param_groups={groups}", *overrides])
    return build.build_optimizer(recipe, build.build_model(recipe))


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", overrides)
    return caught.value.errors


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # nine norms of a weight and a bias, a bias in the head; nine convolutions and the weight of the head
        (DETECTRON, [(18, 0.05, 0), (1, 0.1, 0), (10, 0.05, 5e-4)]),
        (MASKRCNN, [(10, 0.1, 0), (19, 0.05, 5e-4)]),
        ("null", [(29, 0.05, 5e-4)]),
    ],
)
def test_the_groups_of_the_references(groups, expected):
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer_of(groups).param_groups]

    assert found == [(count, pytest.approx(lr), decay) for count, lr, decay in expected]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("{name: SGD, lr: '1e-2', param_groups: [{params: bias, lr_factor: 0.5}]}", [0.005, 0.01]),
        ("{name: SGD, param_groups: [{params: bias, lr_factor: 3}]}", [0.003, 0.001]),  # 1e-3 in torch's signature
        ("{name: DecoupledSGDW, lr: 0.2, param_groups: [{params: bias, lr_factor: 2}]}", [0.4, 0.2]),
    ],
)
def test_the_factor_is_of_the_optimizers_own_rate(optimizer, expected):
    recipe = resolve_recipe("quickstart", [f"optimizers={optimizer}"])

    built = build.build_optimizer(recipe, build.build_model(recipe))

    assert [group["lr"] for group in built.param_groups] == pytest.approx(expected)
    assert all("lr_factor" not in group for group in built.param_groups)


@pytest.mark.parametrize(
    ("groups", "optimizer", "expected"),
    [
        *(
            (f"[{{params: bias, lr_factor: {value}}}]", "{name: SGD, lr: 0.1}", [f"[0].lr_factor` (={shown}) must be"])
            for value, shown in [
                ("0", "0"),
                ("-1", "-1"),
                ("true", "True"),
                ("fast", "'fast'"),
                ("null", "None"),
                (".inf", "inf"),
                (".nan", "nan"),
                ("[2]", "[2]"),
            ]
        ),
        (
            "[{params: norm}, {params: bias, lr_factor: 2, lr: 1}]",
            "{name: SGD}",
            ["[1].lr_factor` and `lr` cannot both be given: one multiplies the optimizer's `lr`, one replaces it."],
        ),
        (
            "[{params: bias, lr_facto: 2}]",
            "{name: SGD, lr: 0.1}",
            ["[0].lr_facto`: unknown argument. Did you mean `lr_factor`?"],
        ),
    ],
)
def test_a_factor_that_is_none_is_a_mistake(groups, optimizer, expected):
    found = mistakes(f"optimizers={optimizer}", f"optimizers.param_groups={groups}")

    assert len(found) == len(expected)
    for mistake, text in zip(found, expected, strict=True):
        assert mistake.startswith(f"`optimizers.param_groups{text}")


def test_a_factor_needs_a_rate():
    groups = "param_groups: [{params: bias, lr_factor: 2}]"

    assert mistakes(f"optimizers={{name: DecoupledSGDW, {groups}}}") == [
        "`optimizers.param_groups[0].lr_factor` needs a number as `optimizers.lr`; DecoupledSGDW has none by default."
    ]
    (mistake,) = mistakes(f"optimizers={{name: SGD, lr: fast, {groups}}}")
    assert mistake.startswith("`optimizers.lr`: (='fast')")
    (mistake, _) = mistakes(f"optimizers={{name: SGD, lr: -1, {groups}}}")
    assert mistake.startswith("`optimizers`: Invalid learning rate: -1")


def test_schedulers_keep_the_ratio():
    overrides = [f"optimizers.param_groups={DETECTRON}", "schedulers={name: MultiStepScheduler, milestones: [1ep]}"]
    train("quickstart", [*FEW, "max_duration=2ep", *overrides, "save_folder=run"])

    rows = read_metrics(Path("run/metrics.jsonl"))
    rates = [[row[f"lr-SGD/group{group}"] for group in range(3)] for row in rows]
    assert rates[0] == pytest.approx([0.05, 0.1, 0.05]) and rates[-1] == pytest.approx([0.005, 0.01, 0.005])
    assert all(second == pytest.approx(2 * first) == 2 * third for first, second, third in rates)


@pytest.mark.parametrize("selector", ["0.weight", "*.weight", "0.*", "norm", "bias"])
def test_names_are_those_before_standardization(selector):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    expected = [[id(p) for p in group["params"]] for group in parameter_groups(plain, [{"params": selector}])]

    apply_weight_standardization(plain)  # keeps the parameters, under other names
    found = [{id(p) for p in group["params"]} for group in parameter_groups(plain, [{"params": selector}])]

    assert found == [set(group) for group in expected]
    with pytest.raises(ValueError, match="selects nothing with '.*original'"):
        parameter_groups(plain, [{"params": "*original"}])
