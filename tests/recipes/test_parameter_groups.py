from collections.abc import Mapping
from typing import Any

import pytest
from composer.models import ComposerClassifier
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ws_algorithm.recipes.parameter_groups import parameter_groups


def network() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), block, nn.Linear(4, 2))


ALL = ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight", "2.1.weight", "2.1.bias", "3.weight", "3.bias"]


def names_of(model: nn.Module, groups: list[Mapping[str, Any]]) -> list[list[str]]:
    """What each group got, by name."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model, groups)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("bias", ["0.bias", "1.bias", "2.1.bias", "3.bias"]),
        ("norm", ["1.weight", "1.bias", "2.1.weight", "2.1.bias"]),
        ("2.*", ["2.0.weight", "2.1.weight", "2.1.bias"]),
        ("*.weight", ["0.weight", "1.weight", "2.0.weight", "2.1.weight", "3.weight"]),
        ("3.bias", ["3.bias"]),
        ("[01].bias", ["0.bias", "1.bias"]),
        (["3.weight", "norm"], ["1.weight", "1.bias", "2.1.weight", "2.1.bias", "3.weight"]),
        ("*", ALL),
    ],
)
def test_selectors(selector, expected):
    chosen, others = names_of(network(), [{"params": selector}])

    assert chosen == expected
    assert others == [name for name in ALL if name not in expected]


def test_the_first_group_that_selects_a_parameter_has_it():
    groups = names_of(network(), [{"params": "bias"}, {"params": "norm"}, {"params": "1.*"}])

    assert groups == [
        ["0.bias", "1.bias", "2.1.bias", "3.bias"],
        ["1.weight", "2.1.weight"],
        [],
        ["0.weight", "2.0.weight", "3.weight"],
    ]


def test_options_stay_with_their_group():
    model = network()
    groups = [{"params": "norm", "weight_decay": 0.0, "lr": 0.3}, {"params": ["3.*"], "momentum": 0.5}]

    found = [{name: value for name, value in g.items() if name != "params"} for g in parameter_groups(model, groups)]

    assert found == [{"weight_decay": 0.0, "lr": 0.3}, {"momentum": 0.5}, {}]
    assert groups[0] == {"params": "norm", "weight_decay": 0.0, "lr": 0.3}


def test_without_groups_all_parameters_are_in_one():
    assert names_of(network(), []) == [ALL]


def test_frozen_parameters_are_in_no_group():
    model = network()
    model[0].requires_grad_(False)

    assert names_of(model, [{"params": "bias"}]) == [
        ["1.bias", "2.1.bias", "3.bias"],
        ["1.weight", "2.0.weight", "2.1.weight", "3.weight"],
    ]
    with pytest.raises(ValueError, match="selects nothing with '0.\\*'"):
        parameter_groups(model, [{"params": "0.*"}])


def test_names_are_those_of_the_module_inside_a_composer_model():
    model = ComposerClassifier(network(), num_classes=2)

    assert names_of(model, [{"params": "3.*"}])[0] == ["module.3.weight", "module.3.bias"]


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True), nn.SyncBatchNorm(4)])
def test_other_normalization_layers_are_norms(layer):
    assert names_of(nn.Sequential(nn.Linear(4, 4), layer), [{"params": "norm"}])[0] == ["1.weight", "1.bias"]


def test_a_parameter_with_two_names_is_in_one_group():
    shared = nn.Linear(4, 4)
    found = parameter_groups(nn.Sequential(shared, nn.Linear(4, 4), shared), [{"params": "0.*"}])

    assert [len(group["params"]) for group in found] == [2, 2]


@pytest.mark.parametrize("group", [{}, {"params": None}, {"params": []}, {"params": [3]}, {"params": 3}, {"lr": 1.0}])
def test_a_group_without_selectors_is_refused(group):
    with pytest.raises(ValueError, match=r"`param_groups\[1\].params` \(=.*must be 'bias', 'norm'"):
        parameter_groups(network(), [{"params": "bias"}, group])


@pytest.mark.parametrize("selector", ["nothing", "", "0", "Bias", "norms", "2.0"])
def test_a_selector_that_selects_nothing_is_refused(selector):
    with pytest.raises(ValueError, match=rf"`param_groups\[0\].params` selects nothing with '{selector}'"):
        parameter_groups(network(), [{"params": ["bias", selector]}])


SELECTORS = st.sampled_from(["bias", "norm", "*", "*.weight", "[0-2].*", "2.*", "2.1.*", *ALL])


@given(st.lists(st.lists(SELECTORS, min_size=1, max_size=3), max_size=4))
def test_groups_are_a_partition(selections):
    model = network()

    found = names_of(model, [{"params": selectors} for selectors in selections])

    assert len(found) == len(selections) + 1
    assert sorted(name for group in found for name in group) == sorted(ALL)
    assert all(group == sorted(group, key=ALL.index) for group in found)
