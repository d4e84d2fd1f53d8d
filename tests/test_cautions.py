"""What is logged about a selection: one line on what was done, and each thing that deserves a second look."""

import logging
from typing import Any

import pytest
import torch
from looked_at import conv, norm
from torch import nn

from ws_algorithm import apply_weight_standardization, inspect_convolutions


@pytest.fixture
def logged(caplog):
    """Applies the method and returns the summary and the warnings."""

    def apply(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="ws_algorithm"):
            apply_weight_standardization(model, *args, **kwargs)
        summary, *warnings = caplog.records
        assert all(record.levelno == logging.WARNING for record in warnings)
        return summary.getMessage(), [record.getMessage() for record in warnings]

    return apply


def model() -> Any:
    return nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm(), nn.Conv2d(2, 2, 1, groups=2), nn.ReLU(), conv())


def test_the_summary(logged):
    summary, warnings = logged(model(), 1)

    assert summary == (
        "Weight Standardization: 2 of 4 convolutions of Sequential standardized; left alone: "
        "5 (fan-in 1: the standardized weight would be 0); 7 (n_last_layers_ignore=1)."
    )
    assert warnings == []


def test_nothing_left_alone(logged):
    summary = logged(nn.Sequential(conv(), norm()))[0]

    assert summary.endswith("1 of 1 convolutions of Sequential standardized; left alone: none.")


def test_nothing_standardized_is_a_warning(caplog):
    with caplog.at_level(logging.INFO, logger="ws_algorithm"):
        apply_weight_standardization(nn.Linear(2, 2))

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0 of 0 convolutions of Linear" in record.getMessage()


def test_a_second_call_says_that_all_is_done(logged):
    net = model()
    logged(net, 1)

    summary, warnings = logged(net, 1)

    assert "0 of 4" in summary
    assert "0, 3 (already standardized)" in summary
    assert warnings == []


def test_no_norm_follows(logged):
    (warning,) = logged(model())[1]

    assert "1 of the 3 convolutions standardized are followed by no normalization layer: 7." in warning
    assert "layers='normalized'" in warning and "`exclude`" in warning
    assert logged(model(), exclude="7")[1] == []
    assert logged(model(), layers="normalized")[1] == []


def test_frozen(logged):
    net = model()
    net[0].weight.requires_grad_(False)

    (warning,) = logged(net, 1)[1]

    assert warning.startswith("0: ") and "frozen" in warning and "`exclude`" in warning
    fresh = model()
    fresh[0].weight.requires_grad_(False)
    assert logged(fresh, 1, exclude="0")[1] == []


def test_a_fan_in_of_two(logged):
    net = nn.Sequential(nn.Conv2d(2, 4, 1), norm_of(4), nn.Conv1d(4, 4, 2, groups=4), norm_of(4), conv(), norm())

    (warning,) = logged(net)[1]

    assert warning.startswith("0, 2: with a fan-in of 2") and "`exclude`" in warning


def norm_of(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


def test_a_weight_that_a_transposed_convolution_shares(logged):
    net: Any = nn.Sequential(conv(), norm(), nn.ConvTranspose2d(2, 2, 3, padding=1))
    net[2].weight = net[0].weight

    (warning,) = logged(net)[1]

    assert warning.startswith("0: ") and "2 (ConvTranspose2d)" in warning and "`exclude`" in warning


def test_a_weight_that_a_convolution_left_alone_shares(logged):
    net: Any = nn.Sequential(conv(), norm(), conv())
    net[2].weight = net[0].weight

    (warning,) = logged(net, 1)[1]

    assert "0: its weight is shared with 2 (Conv2d)" in warning


@pytest.mark.parametrize("owner", ["root", "list"])
def test_a_weight_that_no_layer_owns_shares(logged, owner):
    """A parameter of the model itself, and one in a list, are used where they please."""
    net: Any = nn.Sequential(conv(), norm())
    if owner == "root":
        net.register_parameter("tied", net[0].weight)
    else:
        net.add_module("tied", nn.ParameterList([net[0].weight]))

    (warning,) = [warning for warning in logged(net)[1] if "cannot be told" not in warning]  # a list cannot be called

    assert "shared with" in warning
    assert "shared with  " not in warning  # the root has no name


def test_weights_shared_among_standardized_convolutions(logged):
    net: Any = nn.Sequential(conv(), norm(), conv(), norm())
    net[2].weight = net[0].weight

    assert logged(net)[1] == []


def test_all_at_once(logged):
    """Each names its layers; what is not chosen is not spoken of."""
    net: Any = nn.Sequential(conv(), nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 3), conv())
    net[2].weight = net[0].weight
    net[1].weight.requires_grad_(False)
    net[3].weight.requires_grad_(False)

    warnings = logged(net, 1)[1]

    assert len(warnings) == 4
    assert all("`exclude`" in warning for warning in warnings)
    assert not any("3" in warning.split(":")[0] for warning in warnings if "frozen" in warning)


class Opaque(nn.Module):
    """Defined from the head to the stem, and only for tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.stem = conv(), norm(), conv()

    def forward(self, x: Any) -> Any:
        if type(x) is not torch.Tensor:
            raise TypeError("only for tensors")
        return self.head(self.norm(self.stem(x)))


def test_an_order_in_doubt(logged):
    for n, rules in [(0, {}), (2, {}), (3, {}), (1, {"example_input": torch.ones(1, 2, 4, 4)})]:
        assert not any("n_last_layers_ignore" in warning for warning in logged(Opaque(), n, **rules)[1])

    order, followers = logged(Opaque(), 1)[1]

    for part in ("Opaque", "only for tensors", "2 convolutions", "`example_input`", "`exclude`"):
        assert part in order
    for part in ("follows head cannot be told", "only for tensors", "standardized all the same", "layers='normalized'"):
        assert part in followers


def test_followers_in_doubt(logged):
    (warning,) = logged(Opaque(), layers="normalized")[1]

    for part in ("head, stem", "only for tensors", "`example_input`", "left alone"):
        assert part in warning
    assert logged(Opaque(), layers="normalized", example_input=torch.ones(1, 2, 4, 4))[1] == []


def test_followers_in_doubt_that_another_rule_settles(logged):
    (warning,) = logged(Opaque(), layers="normalized", exclude="head")[1]

    assert "stem" in warning and "head" not in warning


def test_inspecting_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        inspect_convolutions(Opaque(), 1)
        inspect_convolutions(model())

    assert caplog.records == []
