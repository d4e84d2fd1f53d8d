"""What folding leaves as it is, folding a copy, and the way back while raw weights are kept."""

import copy
import io
import logging
from typing import Any

import pytest
import torch
from small_models import conv
from torch import nn
from torch.nn.utils import parametrize

from ws_algorithm import (
    apply_weight_standardization,
    fold_weight_standardization,
    folded_copy,
    is_weight_standardized,
    standardize_once,
    standardize_weight,
    unfold_weight_standardization,
)

FOLDS = [fold_weight_standardization, lambda model: fold_weight_standardization(model, keep_raw=True), folded_copy]
IMAGES = torch.linspace(-1, 1, 50).reshape(1, 2, 5, 5)


def two_convolutions(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, **options), nn.ReLU(), nn.Conv2d(4, 2, 3))


def of_folding(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages of the log, without those about which convolutions are standardized."""
    return [record.getMessage() for record in caplog.records if record.name == "ws_algorithm.folding"]


@pytest.fixture(params=FOLDS, ids=["in place", "raw kept", "copy"])
def fold(request: pytest.FixtureRequest) -> Any:
    def folding(model: Any) -> Any:
        result = request.param(model)
        return model if isinstance(result, int) else result

    return folding


def test_the_memory_format_stays(fold):
    model: Any = two_convolutions()
    model.to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    apply_weight_standardization(model)

    folded = fold(model)

    assert folded[0].weight.stride() == strides
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_weights_stay_frozen_and_the_mode_stays(fold):
    model: Any = two_convolutions().eval()
    model[0].weight.requires_grad_(False)
    apply_weight_standardization(model)

    folded = fold(model)

    assert [p.requires_grad for p in folded.parameters()] == [False, True, True, True]
    assert not any(module.training for module in folded.modules())


def test_the_padding_mode_stays(fold):
    model: Any = two_convolutions(padding=1, padding_mode="circular")
    apply_weight_standardization(model)
    expected = model(IMAGES)

    folded = fold(model)

    assert folded[0].padding_mode == "circular" and torch.equal(folded(IMAGES), expected)


def test_hooks_stay(fold):
    model: Any = two_convolutions()
    called = []
    model[0].register_forward_hook(lambda *_: called.append("forward"))
    model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    apply_weight_standardization(model)

    fold(model)(IMAGES).sum().backward()

    assert called == ["forward", "backward"]


def test_hooks_of_the_parameter_stay():
    model: Any = two_convolutions()
    called = []
    model[0].weight.register_hook(lambda gradient: called.append("gradient"))
    apply_weight_standardization(model)

    fold_weight_standardization(model)
    model(IMAGES).sum().backward()

    assert called == ["gradient"]


def test_ties_and_names_stay(fold):
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    model.again = model[0]
    apply_weight_standardization(model)

    folded = fold(model)

    assert folded[0].weight is folded[1].weight and folded.again is folded[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_stays(fold, dtype):
    model: Any = two_convolutions().to(dtype)
    apply_weight_standardization(model)
    expected = model[0].weight.detach().clone()

    folded = fold(model)

    assert folded[0].weight.dtype == dtype and torch.equal(folded[0].weight, expected)


def test_the_precision_stays_under_autocast(fold):
    model: Any = two_convolutions()
    expected = standardize_weight(model[0].weight.detach())
    apply_weight_standardization(model)

    with standardize_once(model), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model[0].weight.dtype == torch.bfloat16
        folded = fold(model)

    assert torch.equal(folded[0].weight, expected)


def test_folding_on_the_meta_device():
    with torch.device("meta"):
        model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    apply_weight_standardization(model)

    assert fold_weight_standardization(model, keep_raw=True) == unfold_weight_standardization(model) == 2


def test_a_folded_copy_shares_nothing():
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    raw = copy.deepcopy(model.state_dict())

    folded = folded_copy(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()

    assert is_weight_standardized(model) and not is_weight_standardized(folded)
    assert all(torch.equal(value, raw[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_copied_is_refused():
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    model.graph = torch.ones(1, requires_grad=True) * 2  # deepcopy takes leaves alone

    with pytest.raises(ValueError, match=r"`module` \(Sequential\) cannot be copied .* keep_raw=True"):
        folded_copy(model)


def test_unfolding_brings_back_values_objects_and_keys():
    model: Any = two_convolutions()
    parameters = list(model.parameters())
    apply_weight_standardization(model, formula="paper")
    keys, raw, expected = list(model.state_dict()), copy.deepcopy(model.state_dict()), model(IMAGES)

    assert fold_weight_standardization(model, keep_raw=True) == 2
    folded_keys = list(model.state_dict())
    assert unfold_weight_standardization(model) == 2

    assert folded_keys == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, raw[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(IMAGES), expected)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}


def test_an_optimizer_goes_on_after_unfolding():
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    twin = copy.deepcopy(model)
    for one, interrupted in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            one(IMAGES).square().sum().backward()
            optimizer.step()
            if interrupted:
                fold_weight_standardization(one, keep_raw=True)
                unfold_weight_standardization(one)

    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_is_assigned_after_unfolding_is_the_raw_weight():
    layer = conv()
    apply_weight_standardization(layer)
    fold_weight_standardization(layer, keep_raw=True)
    unfold_weight_standardization(layer)

    layer.load_state_dict({"weight": torch.full_like(layer.weight, 2.0), "bias": torch.zeros(2)})

    assert bool((layer.parametrizations.weight.original == 2).all())  # pyright: ignore
    fold_weight_standardization(layer)
    assert type(layer) is nn.Conv2d


def test_kept_weights_are_no_state_and_no_file_has_them():
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    fold_weight_standardization(model, keep_raw=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)

    read = torch.load(buffer, weights_only=False)

    assert len(list(model.parameters())) == 4 and not list(model.buffers())
    assert torch.equal(read(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="`module` has no raw weights to go back to"):
        unfold_weight_standardization(read)


def test_a_copy_unfolds_by_itself():
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    apply_weight_standardization(model)
    expected = model(IMAGES)
    fold_weight_standardization(model, keep_raw=True)
    folded_keys = list(model.state_dict())

    copied: Any = copy.deepcopy(model)
    unfold_weight_standardization(copied)

    assert torch.equal(copied(IMAGES), expected)
    assert copied[0].parametrizations.weight.original is copied[1].parametrizations.weight.original
    assert list(model.state_dict()) == folded_keys and not is_weight_standardized(model)
    assert unfold_weight_standardization(model) == 2


def test_unfolding_in_another_dtype_and_mode(caplog):
    model: Any = two_convolutions()
    raw = model[0].weight.detach().clone()
    apply_weight_standardization(model)
    fold_weight_standardization(model, keep_raw=True)

    model.to(torch.float64).eval()
    unfold_weight_standardization(model)

    original = model[0].parametrizations.weight.original
    assert torch.equal(original, raw.double())
    assert not any(module.training for module in model.modules())
    assert of_folding(caplog) == []  # no folded weight differs by more than its rounding


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changes_of_folded_weights_are_dropped_with_a_warning(changed, caplog):
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    expected = model(IMAGES)
    fold_weight_standardization(model, keep_raw=True)
    with torch.no_grad():
        for layer in (model[0], model[2])[:changed]:
            layer.weight.mul_(1.01)

    with caplog.at_level(logging.WARNING):
        unfold_weight_standardization(model)

    assert torch.equal(model(IMAGES), expected)
    said = f"{changed} of 2 folded weights of Sequential were changed"
    assert [said in message for message in of_folding(caplog)] == [True] * (changed > 0)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def of_another_shape(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.zeros(2, 2, 1, 1))


@pytest.mark.parametrize("change", [parametrized, of_another_shape, apply_weight_standardization])
def test_a_layer_that_was_changed_since_is_not_unfolded(change):
    model: Any = two_convolutions()
    apply_weight_standardization(model)
    fold_weight_standardization(model, keep_raw=True)
    change(model[2])
    keys = list(model.state_dict())

    with pytest.raises(ValueError, match="`module` has a layer, '2', that was parametrized, sharded or replaced"):
        unfold_weight_standardization(model)

    assert list(model.state_dict()) == keys and type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("keep_raw", [False, None])
def test_nothing_to_unfold(keep_raw):
    model = two_convolutions()
    if keep_raw is not None:
        apply_weight_standardization(model)
        fold_weight_standardization(model, keep_raw=keep_raw)

    with pytest.raises(ValueError, match="Fold with keep_raw=True"):
        unfold_weight_standardization(model)


@pytest.mark.parametrize("function", [fold_weight_standardization, unfold_weight_standardization, folded_copy])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(ValueError, match="`module` must be a torch.nn.Module"):
        function([conv()])


def test_an_edit_that_pytorch_does_not_count_is_folded(fold):
    model: Any = nn.Sequential(nn.Conv2d(16, 16, 3))
    apply_weight_standardization(model)
    raw = model[0].parametrizations.weight.original
    with torch.no_grad():
        model[0](torch.randn(1, 16, 5, 5))
        raw.data.view(-1)[1] += 1
    expected = standardize_weight(raw.detach().clone())

    assert torch.equal(fold(model)[0].weight, expected)
