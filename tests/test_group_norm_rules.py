"""What the GroupNorm surgery refuses or leaves alone, always before anything has changed, and what it says."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import apply_group_normalization, apply_weight_standardization


def small_model() -> Any:
    block = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.LayerNorm([24, 4, 4]))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block)


def everything(model: nn.Module) -> tuple[Any, ...]:
    layers = [(name, id(layer), layer.training) for name, layer in model.named_modules()]
    lazy = nn.parameter.is_lazy
    tensors = model.state_dict(keep_vars=True).items()
    return layers, [(key, id(t), None if lazy(t) else (t._version, t.tolist())) for key, t in tensors]


def norms(model: nn.Module) -> list[str]:
    """The names of the GroupNorms."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.GroupNorm)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_groups": 0}, r"`num_groups` \(=0\) must be a whole number, 1 or more"),
        ({"num_groups": True}, "`num_groups`"),
        ({"num_groups": 8.0}, "`num_groups`"),
        ({"num_groups": None}, "`num_groups`"),
        ({"channels_per_group": -1}, "`channels_per_group`"),
        ({"channels_per_group": "8"}, "`channels_per_group`"),
        ({"num_groups": 8, "channels_per_group": 8}, r"`num_groups` \(=8\) and `channels_per_group` \(=8\) exclude"),
        ({"indivisible": "nearest"}, "`indivisible` .*'error', 'largest_divisor'"),
        ({"copy_affine": 1}, "`copy_affine`"),
        ({"eps": 0}, "`eps`"),
        ({"eps": float("nan")}, "`eps`"),
        ({"eps": "1e-5"}, "`eps`"),
        ({"include": []}, "`include`.*None for no such rule"),
        ({"exclude": [1]}, "`exclude`.*name of a layer or a pattern"),
        ({"include": "2.2.1"}, "`include` has '2.2.1', which matches none of the 3 normalization layers of Sequential"),
        ({"exclude": "0"}, "`exclude` has '0', which matches none of the 3"),
        ({"optimizers": "SGD"}, "`optimizers`.*torch.optim.Optimizer"),
        ({"optimizers": [None]}, "`optimizers`"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    model = small_model()
    before = everything(model)

    with pytest.raises(ValueError, match=message):
        apply_group_normalization(model, **{"indivisible": "largest_divisor"} | arguments)

    assert everything(model) == before


def test_whole_numbers_of_numpy_and_the_default_beside_channels_per_group():
    assert apply_group_normalization(small_model(), np.int64(8)) == 2  # type: ignore[arg-type]
    assert apply_group_normalization(small_model(), 32, channels_per_group=8) == 2


def test_channels_that_do_not_divide_are_all_named_with_the_choices():
    model = nn.Sequential(*[nn.BatchNorm2d(channels) for channels in (64, 16, 24, 16, 3)])
    before = everything(model)

    with pytest.raises(ValueError) as caught:
        apply_group_normalization(model, exclude="4")
    assert everything(model) == before
    assert "`num_groups` (=32) must divide" in str(caught.value)
    assert "16 channels: 1, 3; 24 channels: 2. " in str(caught.value)
    for choice in ("`num_groups` or `channels_per_group`", "indivisible='largest_divisor'", "`exclude`"):
        assert choice in str(caught.value)
    with pytest.raises(ValueError, match=r"`channels_per_group` \(=16\).* 3 channels: 4; 24 channels: 2\. "):
        apply_group_normalization(model, channels_per_group=16)
    assert apply_group_normalization(model, exclude=["1", "2", "3", "4"]) == 1


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({"include": "1"}, ["1"]),
        ({"include": "2"}, ["2.1"]),
        ({"exclude": "2.*"}, ["1"]),
        ({"include": ["1", "2.1"], "exclude": ["1"]}, ["2.1"]),
        ({"include": "2.2"}, []),  # a LayerNorm
    ],
    ids=str,
)
def test_names_and_patterns(rules, expected):
    model = small_model()

    assert apply_group_normalization(model, 8, **rules) == len(expected)
    assert norms(model) == expected


@pytest.mark.parametrize("module", [None, [nn.BatchNorm2d(8)], torch.zeros(2, 2), nn.BatchNorm2d], ids=repr)
def test_what_is_not_a_module(module):
    with pytest.raises(ValueError, match=r"`module` must be a torch.nn.Module, got"):
        apply_group_normalization(module)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(32), nn.SyncBatchNorm(32), FrozenBatchNorm2d(32), BatchNormAct2d(32)])
def test_a_model_that_is_a_batch_norm_itself(layer):
    with pytest.raises(ValueError, match=f"itself a {type(layer).__name__}.*torch.nn.GroupNorm"):
        apply_group_normalization(layer)


@pytest.mark.parametrize("compile", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), torch.zeros(2, 32, 5, 5))])
def test_a_script_module(compile):
    with pytest.raises(ValueError, match="ScriptModule"):
        apply_group_normalization(compile(nn.Sequential(nn.BatchNorm2d(32))))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("affine", [True, False])
def test_lazy_batch_norms(affine):
    model = nn.Sequential(nn.BatchNorm2d(32), nn.LazyBatchNorm2d(affine=affine))
    before = everything(model)

    with pytest.raises(ValueError, match="lazy: 1. Run one batch"):
        apply_group_normalization(model)
    assert everything(model) == before

    assert apply_group_normalization(model, exclude="1") == 1
    model(torch.randn(2, 32, 4, 4))
    assert apply_group_normalization(model) == 1 and norms(model) == ["0", "1"]


def test_hooks_on_saving_are_warned_about(caplog):
    model = nn.Sequential(nn.BatchNorm2d(8))
    model[0].register_load_state_dict_post_hook(lambda layer, keys: None)

    apply_group_normalization(model, 4)

    assert [record.getMessage() for record in caplog.records] == [
        "0: its hooks on saving and loading are not taken over."
    ]


def test_parameters_that_other_layers_share_are_warned_about(caplog):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    model[1].weight = model[0].weight

    assert apply_group_normalization(model, 4, exclude="1", copy_affine=True) == 1
    assert not caplog.records
    model[0] = nn.BatchNorm2d(8)
    model[1].weight = model[0].weight
    apply_group_normalization(model, 4, exclude="1")

    assert [record.getMessage() for record in caplog.records] == [
        "1: set to 1 and 0 with parameters of batch norms that share them."
    ]


def test_groups_of_one_channel_on_vectors_are_warned_about(caplog):
    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm2d(8), nn.BatchNorm1d(16)).double()

    apply_group_normalization(model, 8)

    assert_close(model[0](torch.randn(2, 8).double()), torch.zeros(2, 8).double())
    assert [record.getMessage() for record in caplog.records] == [
        "0: groups of one channel, whose output for inputs of shape (N, C) is constant."
    ]


@pytest.mark.parametrize(
    "model, level, line",
    [
        (nn.Sequential(nn.Linear(2, 2)), "WARNING", "0 of 0 batch norms of Sequential replaced; left alone: none."),
        (nn.Sequential(nn.GroupNorm(2, 4)), "INFO", "0 of 0 batch norms of Sequential replaced; left alone: none."),
        (nn.Sequential(nn.BatchNorm2d(32)), "INFO", "1 of 1 batch norms of Sequential replaced; left alone: none."),
        (nn.Conv2d(2, 2, 1), "WARNING", "0 of 0 batch norms of Conv2d replaced; left alone: none."),
    ],
)
def test_one_line_says_what_was_done_and_nothing_to_do_is_a_warning(model, level, line, caplog):
    caplog.set_level(logging.INFO, logger="ws_algorithm")

    apply_group_normalization(model)

    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [(level, f"Group Normalization: {line}")]


def test_what_rules_leave_alone_is_in_that_line(caplog):
    caplog.set_level(logging.INFO, logger="ws_algorithm")

    apply_group_normalization(small_model(), 8, exclude="2")

    assert [r.getMessage() for r in caplog.records] == [
        "Group Normalization: 1 of 2 batch norms of Sequential replaced; left alone: 2.1 (exclude='2')."
    ]


def test_the_order_with_weight_standardization_does_not_matter():
    first, last = small_model(), small_model()
    last.load_state_dict(first.state_dict())

    counts = [apply_group_normalization(first, 8), apply_weight_standardization(first, layers="normalized")]
    assert counts == [2, 2]
    assert [apply_weight_standardization(last, layers="normalized"), apply_group_normalization(last, 8)] == counts

    expected, actual = first.state_dict(), last.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(first(x), last(x))
