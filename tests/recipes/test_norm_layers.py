import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm.recipes.norm_layers import check_groups, resolve_norm_layer


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("frozen", FrozenBatchNorm2d)]
)
def test_a_norm_by_name(norm, kind):
    layer = resolve_norm_layer(norm)(64)

    assert type(layer) is kind
    assert layer.eps == 1e-5
    assert layer.weight.shape == (64,)


def test_a_frozen_norm_has_no_parameters():
    layer = resolve_norm_layer("frozen")(8)

    assert list(layer.parameters()) == []
    assert sorted(name for name, _ in layer.named_buffers()) == ["bias", "running_mean", "running_var", "weight"]


@given(groups=st.integers(1, 40), size=st.integers(1, 40))
def test_both_ways_to_say_the_groups_agree(groups, size):
    by_number = resolve_norm_layer("group", groups)(groups * size)
    by_size = resolve_norm_layer("group", None, size)(groups * size)

    assert isinstance(by_number, nn.GroupNorm) and isinstance(by_size, nn.GroupNorm)
    assert by_number.num_groups == by_size.num_groups == groups
    assert by_number.num_channels == by_size.num_channels == groups * size


@given(divisor=st.integers(2, 40), channels=st.integers(1, 200), argument=st.sampled_from(["num_groups", "channels"]))
def test_what_does_not_divide_a_layer_is_refused(divisor, channels, argument):
    assume(channels % divisor)
    argument = "channels_per_group" if argument == "channels" else argument
    norm_layer = resolve_norm_layer("group", **{argument: divisor})

    with pytest.raises(ValueError) as caught:
        norm_layer(channels)
    assert f"`{argument}` (={divisor}) must divide" in str(caught.value)
    assert f"one has {channels}." in str(caught.value)
    assert "Set `num_groups` or `channels_per_group`" in str(caught.value)


def groups_of(**arguments: int) -> int:
    layer = resolve_norm_layer("group", **arguments)(96)
    assert isinstance(layer, nn.GroupNorm)
    return layer.num_groups


def test_defaults_give_way_to_what_is_said():
    assert groups_of() == 32
    assert groups_of(default_num_groups=8) == 8
    assert groups_of(default_channels_per_group=6) == 96 // 6
    assert groups_of(num_groups=4, default_channels_per_group=6) == 4
    assert groups_of(channels_per_group=48, default_num_groups=8) == 96 // 48


def test_a_norm_is_the_formula_over_each_group():
    layer = resolve_norm_layer("group", channels_per_group=3)(6)
    x = torch.randn(2, 6, 4, 5)
    groups = x.view(2, 2, 3 * 4 * 5)

    expected = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(layer(x), expected.view_as(x))


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"`norm` \(='layer'\) must be 'batch', 'group' or 'frozen'"):
        resolve_norm_layer("layer")


def test_both_numbers_exclude_each_other():
    with pytest.raises(ValueError, match=r"`num_groups` \(=8\) and `channels_per_group` \(=2\) exclude each other"):
        resolve_norm_layer("group", 8, 2)


@pytest.mark.parametrize("argument", ["num_groups", "channels_per_group"])
@pytest.mark.parametrize("value", [0, -4])
def test_groups_that_are_not_positive_are_refused(argument, value):
    with pytest.raises(ValueError, match=rf"`{argument}` \(={value}\) must be at least 1"):
        resolve_norm_layer("group", **{argument: value})


@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.parametrize("argument", ["num_groups", "channels_per_group"])
def test_groups_of_a_norm_without_groups_are_refused(norm, argument):
    with pytest.raises(ValueError, match=rf"`{argument}` \(=8\) is for norm='group', and `norm` is '{norm}'"):
        resolve_norm_layer(norm, **{argument: 8})


def test_no_groups_fit_any_norm():
    check_groups("none", None, None)

    with pytest.raises(ValueError, match="Leave it out"):
        check_groups("none", 1, None)
