"""The memory of the standardized weights stays with the model from one scope to the next."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact_twins import CONVOLUTIONS, gradients, images, loss_of, tiny
from torch import nn
from torch.testing import assert_close

from ws_algorithm import (
    FORMULAS,
    apply_weight_standardization,
    release_standardized_weights,
    remove_weight_standardization,
    standardize_once,
)
from ws_algorithm.layers import raw_weight


def addresses(model: Any, autocast: bool = False) -> list[int]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return [model[index].weight.data_ptr() for index in CONVOLUTIONS]


def step(model: Any, optimizer: torch.optim.Optimizer | None = None) -> list[int]:
    """A step of three micro-batches; the addresses of its standardized weights."""
    model.zero_grad()
    with standardize_once(model):
        for batch in images(raw_weight(model[0]).dtype):
            loss_of(model, batch).backward()
        found = addresses(model)
    if optimizer is not None:
        optimizer.step()
    return found


# What is read of the others is behind gain and shift
@pytest.mark.parametrize("formula", [name for name, formula in FORMULAS.items() if formula.rescaling is None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_steps_and_evaluations_write_into_the_same_memory(formula, layout):
    model = tiny(formula).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    first = step(model, optimizer)
    second = step(model, optimizer)
    with standardize_once(model):
        third = addresses(model)

    assert first == second == third


def bytes_allocated_at_once(run: Any) -> int:
    """The largest allocation of a run on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events: Any = profile.events()
    return max(event.cpu_memory_usage for event in events)


def test_a_step_after_the_first_allocates_nothing_of_the_size_of_a_weight():
    torch.manual_seed(0)
    conv: Any = nn.Conv2d(512, 512, 3, bias=False)  # 9.4 MB
    apply_weight_standardization(conv)
    raw: Any = raw_weight(conv)
    raw.grad = torch.randn_like(raw)

    def open_and_close() -> None:
        with standardize_once(conv), torch.no_grad():
            assert conv.weight.shape == raw.shape
            entry: Any = conv.parametrizations["weight"][0].cache.entry
            entry.pending = entry.cached  # as after a backward: raw.grad is projected at the end

    first, second = bytes_allocated_at_once(open_and_close), bytes_allocated_at_once(open_and_close)

    assert first >= raw.nbytes  # the memory that stays
    assert 0 < second < raw.nbytes / 4  # blocks of rows


@pytest.mark.parametrize("is_training", [True, False])
def test_a_tensor_that_the_user_keeps_is_never_written_to(is_training):
    model = tiny()
    with standardize_once(model), nullcontext() if is_training else torch.no_grad():
        mine = model[3].weight
    values = mine.detach().clone()
    with torch.no_grad():
        raw_weight(model[3]).add_(torch.arange(3.0).view(1, 3, 1, 1)[:, :2])

    with standardize_once(model), torch.no_grad():
        other = model[3].weight

    assert torch.equal(mine, values) and not torch.allclose(other, mine)
    assert other.data_ptr() != mine.data_ptr()


def test_a_graph_that_is_left_over_keeps_the_weights_that_it_was_made_with():
    model, exact = tiny(), tiny()
    with standardize_once(model):
        late = loss_of(model, images()[0])
    with standardize_once(model):
        loss_of(model, images()[1]).backward()
    late.backward()
    loss_of(exact, images()[0]).backward()
    loss_of(exact, images()[1]).backward()

    for name, gradient in gradients(exact).items():
        assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-12)


def test_a_gradient_of_a_weight_that_was_overwritten_is_refused_not_wrong():
    """Autograd keeps the weight itself for a convolution, and not for a sum."""
    model = tiny()
    with standardize_once(model):
        late = (model[0].weight * torch.arange(3.0).view(1, 3, 1, 1)).sum()
    with torch.no_grad():
        raw_weight(model[0]).mul_(2).add_(torch.arange(3.0).view(1, 3, 1, 1))
    with standardize_once(model), torch.no_grad():
        model(images()[0])

    with pytest.raises(RuntimeError, match="changed, and standardized again, between a forward and its backward"):
        late.backward()


def test_the_memory_follows_the_dtype_of_autocast_and_is_one_copy():
    model = tiny(dtype=torch.float32)
    with standardize_once(model):
        addresses(model)
    in_float32 = release_standardized_weights(model)
    with standardize_once(model):
        addresses(model, autocast=True)
    in_bfloat16 = release_standardized_weights(model)

    count = sum(raw_weight(model[index]).numel() for index in CONVOLUTIONS)
    statistics = 2 * 4 * sum(len(raw_weight(model[index])) for index in CONVOLUTIONS)  # mean and scale, float32
    assert in_float32 == 4 * count + statistics
    assert in_bfloat16 == 2 * count + statistics
    assert release_standardized_weights(model) == 0


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to("meta"),
        lambda model: model.float(),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
    ids=["to meta", "float", "channels_last"],
)
def test_a_model_that_moves_gives_the_memory_back(move):
    model = tiny()
    step(model)

    move(model)

    assert release_standardized_weights(model) == 0


def test_a_model_that_is_no_longer_standardized_has_no_memory():
    model = tiny()
    step(model)
    caches = [model[index].parametrizations["weight"][0].cache for index in CONVOLUTIONS]

    remove_weight_standardization(model)

    assert release_standardized_weights(model) == 0
    assert not any(cache.entry for cache in caches)


def test_tied_convolutions_share_one_copy():
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    apply_weight_standardization(model)
    with standardize_once(model), torch.no_grad():
        assert model[0].weight.data_ptr() == model[1].weight.data_ptr()

    assert release_standardized_weights(model) == 4 * (3 * 27 + 2 * 3)


@pytest.mark.parametrize("model", [None, 3, "model"], ids=repr)
def test_what_is_no_module_has_no_memory_to_release(model):
    with pytest.raises(ValueError, match="`model` must be a torch.nn.Module, got "):
        release_standardized_weights(model)
