"""Rules about which convolutions are chosen, alone and together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import conv, norm
from torch import nn

from ws_algorithm import apply_weight_standardization, inspect_convolutions, is_weight_standardized
from ws_algorithm.selection import Rules, select_convolutions


def block() -> nn.Module:
    return nn.Sequential(conv(), norm(), nn.ReLU(), conv())


def model() -> Any:
    """In the order of execution: stem, layer1.0, layer1.3, layer10.0, layer10.3, head; `*.0` and stem have a norm."""
    layers = {"stem": conv(), "norm": norm(), "layer1": block(), "layer10": block(), "head": conv()}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def chosen(net: nn.Module, *args: Any, **rules: Any) -> str:
    return " ".join(choice.name for choice in select_convolutions(net, Rules(*args, **rules)).chosen)


RULES: list[tuple[dict[str, Any], str]] = [
    ({}, "stem layer1.0 layer1.3 layer10.0 layer10.3 head"),
    ({"layers": "normalized"}, "stem layer1.0 layer10.0"),
    ({"include": "layer1"}, "layer1.0 layer1.3"),  # not layer10
    ({"include": "layer1*"}, "layer1.0 layer1.3 layer10.0 layer10.3"),
    ({"include": ["*.0", "head"]}, "layer1.0 layer10.0 head"),
    ({"include": ("stem",)}, "stem"),
    ({"include": (name for name in ["stem"])}, "stem"),
    ({"include": {"stem"}}, "stem"),
    ({"include": "layer1?.*"}, "layer10.0 layer10.3"),
    ({"include": "[sh]*"}, "stem head"),
    ({"exclude": "layer1.0"}, "stem layer1.3 layer10.0 layer10.3 head"),
    ({"exclude": ["layer1", "head"]}, "stem layer10.0 layer10.3"),
    ({"exclude": "*"}, ""),
    ({"include": "layer1", "exclude": "*.0"}, "layer1.3"),
    ({"include": "layer1", "layers": "normalized"}, "layer1.0"),
    ({"exclude": "stem", "layers": "normalized"}, "layer1.0 layer10.0"),
    ({"predicate": lambda name, layer: "3" in name}, "layer1.3 layer10.3"),
    ({"predicate": lambda name, layer: layer.bias is None}, ""),
    ({"predicate": lambda name, layer: np.True_, "include": "stem"}, "stem"),
    ({"n_last_layers_ignore": 1}, "stem layer1.0 layer1.3 layer10.0 layer10.3"),
    ({"n_last_layers_ignore": 2, "layers": "normalized"}, "stem layer1.0 layer10.0"),
    ({"n_last_layers_ignore": 3, "layers": "normalized"}, "stem layer1.0"),  # all are counted
    ({"n_last_layers_ignore": 3, "include": "layer10"}, ""),
    ({"n_last_layers_ignore": 100}, ""),
]


@pytest.mark.parametrize("rules, expected", RULES)
def test_rules(rules, expected):
    assert chosen(model(), **rules) == expected


@pytest.mark.parametrize("rules, expected", RULES[1:6])
def test_rules_of_the_function(rules, expected):
    net = model()

    assert apply_weight_standardization(net, **rules) == len(expected.split())
    assert " ".join(name for name, layer in net.named_modules() if is_standardized_itself(layer)) == expected


def is_standardized_itself(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and is_weight_standardized(layer)


BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({"layers": "none"}, "`layers` \\(='none'\\) must be one of 'all', 'normalized'"),
    ({"layers": None}, "`layers` \\(=None\\)"),
    ({"layers": ["all"]}, "`layers`"),
    ({"include": []}, "`include` \\(=\\[\\]\\) must name at least one"),
    ({"exclude": ()}, "`exclude` .* must name at least one"),
    ({"include": 3}, "`include` \\(=3\\) must be a name"),
    ({"include": ["stem", 3]}, "`include`"),
    ({"include": [None]}, "`include`"),
    ({"exclude": b"stem"}, "`exclude`"),
    ({"exclude": Path("stem")}, "`exclude`"),
    ({"exclude": [["stem"]]}, "`exclude`"),
    ({"exclude": True}, "`exclude`"),
    ({"predicate": "stem"}, "`predicate` \\(='stem'\\) must be a function"),
    ({"predicate": True}, "`predicate`"),
    ({"n_last_layers_ignore": -1}, "`n_last_layers_ignore` \\(=-1\\)"),
    ({"n_last_layers_ignore": 1.0}, "`n_last_layers_ignore`"),
    ({"n_last_layers_ignore": "1"}, "`n_last_layers_ignore`"),
    ({"n_last_layers_ignore": None}, "`n_last_layers_ignore`"),
    ({"n_last_layers_ignore": True}, "`n_last_layers_ignore`"),
    ({"n_last_layers_ignore": np.bool_(True)}, "`n_last_layers_ignore`"),
    ({"n_last_layers_ignore": torch.tensor(1)}, "`n_last_layers_ignore`"),
]


@pytest.mark.parametrize("rules, message", BAD_RULES)
@pytest.mark.parametrize("function", [inspect_convolutions, apply_weight_standardization])
def test_values_of_another_kind(function, rules, message):
    net = model()

    with pytest.raises(ValueError, match=message):
        function(net, **rules)

    assert not is_weight_standardized(net)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("haed", "'head'"),
        ("layer1.4", "'layer1.[03]'"),
        ("layer11", "'layer10?'"),
        ("module.stem", "'stem'"),
        ("norm", "."),  # exists, but is no convolution and contains none
        ("", "inspect_convolutions"),
        ("HEAD", "inspect_convolutions"),
        ("layer1.", "'layer1"),
    ],
)
def test_a_pattern_that_matches_nothing(argument, pattern, hint):
    net = model()

    with pytest.raises(ValueError, match=f"`{argument}` has {pattern!r}, which matches none of the 6.*{hint}"):
        chosen(net, **{argument: ["stem", pattern]})


def test_patterns_match_every_name_of_a_convolution():
    layer = conv()
    net = nn.ModuleDict({"first": layer, "again": layer, "other": conv()})

    assert chosen(net, include="again") == "first"
    assert chosen(net, exclude="again") == "other"


def test_the_predicate_sees_what_the_other_rules_admit():
    seen: list[tuple[str, bool]] = []

    def predicate(name: str, layer: nn.Module) -> bool:
        seen.append((name, isinstance(layer, nn.Conv2d)))
        return True

    chosen(model(), 2, layers="normalized", exclude="stem", predicate=predicate)

    assert seen == [("layer1.0", True), ("layer10.0", True)]


def test_an_error_of_the_predicate_is_passed_on():
    net = model()

    with pytest.raises(ZeroDivisionError):
        apply_weight_standardization(net, predicate=lambda name, layer: name != "stem" or bool(1 / 0))

    assert not is_weight_standardized(net)


def test_a_model_that_is_a_convolution():
    layer = conv()

    assert chosen(layer, layers="normalized") == ""
    assert len(select_convolutions(layer, Rules(exclude="*")).chosen) == 0
    assert len(select_convolutions(layer, Rules(include="")).chosen) == 1
    with pytest.raises(ValueError, match="matches none of the 1 convolutions of Conv2d"):
        chosen(layer, include="weight")


@pytest.mark.parametrize("key", ["a[0]", "a?", "a*", "[a]", "a b", "é", "A"])
def test_a_name_matches_itself(key):
    """Names may contain what is special in a pattern; the messages of the package recommend them literally."""
    net = nn.ModuleDict({key: nn.Sequential(conv()), "b": conv()})

    assert chosen(net, exclude=f"{key}.0") == "b"
    assert chosen(net, exclude=key) == "b"


def test_names_behind_wrappers():
    net = nn.DataParallel(model())

    assert chosen(net, include="module.stem") == "module.stem"
    assert chosen(net, include="*stem") == "module.stem"
    with pytest.raises(ValueError, match="Did you mean 'module.stem'"):
        chosen(net, include="stem")


def test_a_model_without_convolutions():
    net = nn.Linear(2, 2)

    assert inspect_convolutions(net) == []
    with pytest.raises(ValueError, match="`include` has 'a', which matches none of the 0 convolutions of Linear"):
        inspect_convolutions(net, include="a")


@pytest.mark.parametrize("net", [None, "model", nn.Conv2d, [conv()]])
def test_what_is_no_model(net):
    with pytest.raises(ValueError, match="`module` must be a torch.nn.Module"):
        inspect_convolutions(net)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model():
    with pytest.raises(ValueError, match="ScriptModule"):
        inspect_convolutions(torch.jit.script(nn.Sequential(conv())))
