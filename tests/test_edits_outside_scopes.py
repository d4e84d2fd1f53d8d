"""Outside of ``standardize_once`` nothing is cached: every edit of a raw weight is seen by the next forward.

What a network must compute is what a plain one computes whose layers standardize by the authors' own code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from ws_algorithm import apply_weight_standardization, plain_state_dict, standardize_once
from ws_algorithm.layers import raw_weight

SEED = 4


class AuthorsConv2d(nn.Conv2d):
    """The layer of https://github.com/joe-siyuan-qiao/WeightStandardization."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(input, weight / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


def network(conv: type[nn.Conv2d]) -> Any:
    torch.manual_seed(SEED)
    norms = [nn.GroupNorm(2, 8), nn.GroupNorm(2, 4)]
    return nn.Sequential(conv(3, 8, 3), norms[0], nn.ReLU(), conv(8, 4, 3, groups=2), norms[1]).double()


def standardized() -> Any:
    model = network(nn.Conv2d)
    apply_weight_standardization(model, formula="paper")
    return model


def weights_of(model: Any) -> list[nn.Parameter]:
    return [raw_weight(model[index]) for index in (0, 3)]


def values(weight: Tensor, shift: float) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return 0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype) + shift


# One edit of one weight; called several times with other values


def data_in_place(weight: Any, shift: float) -> None:
    weight.data.mul_(0.9).add_(values(weight, shift), alpha=0.1)


def data_of_one_element(weight: Any, shift: float) -> None:
    weight.data.view(-1)[1] += 1.0 + shift


def data_assigned(weight: Any, shift: float) -> None:
    weight.data = 0.5 * weight.data + values(weight, shift)


def no_grad_in_place(weight: Any, shift: float) -> None:
    with torch.no_grad():
        weight.mul_(0.7).add_(values(weight, shift))


def numpy_in_place(weight: Any, shift: float) -> None:
    array = weight.detach().numpy()
    np.add(array, values(weight, shift).numpy(), out=array)


def set_to_other_storage(weight: Any, shift: float) -> None:
    with torch.no_grad():
        weight.set_(weight.detach() + values(weight, shift))


def average_by_hand(weight: Any, shift: float) -> None:
    """As of a mean teacher, from the weights of a student."""
    torch.add(0.99 * weight.data, values(weight, shift), alpha=0.01, out=weight.data)


def merge_and_unmerge(weight: Any, shift: float) -> None:
    """As LoRA adds a product of low rank, and takes another one away."""
    rows = weight.data.view(len(weight), -1)
    for sign in (1.0, -0.5):
        rows += sign * torch.outer(values(weight[:, 0, 0, 0], shift), values(rows[0], shift))


def vector_to_parameters(weight: Any, shift: float) -> None:
    vector = nn.utils.parameters_to_vector([weight]).detach()
    nn.utils.vector_to_parameters(1.1 * vector + values(vector, shift), [weight])


def pruning_mask(weight: Any, shift: float) -> None:
    weight.data *= (values(weight, shift) < 0.2).double()


EDITS: list[Callable[[Any, float], None]] = [
    data_in_place,
    data_of_one_element,
    data_assigned,
    no_grad_in_place,
    numpy_in_place,
    set_to_other_storage,
    average_by_hand,
    merge_and_unmerge,
    vector_to_parameters,
    pruning_mask,
]
PLACES: dict[str, tuple[bool, Callable[[], AbstractContextManager]]] = {
    "training": (True, nullcontext),
    "training mode, no_grad": (True, torch.no_grad),
    "evaluation": (False, nullcontext),
    "evaluation, no_grad": (False, torch.no_grad),
    "evaluation, inference_mode": (False, torch.inference_mode),
}


@pytest.mark.parametrize("is_scope_between", [False, True], ids=["no scope", "after a scope"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("edit", EDITS)
def test_the_next_forward_sees_an_edit(edit, place, is_scope_between):
    is_training, mode = PLACES[place]
    model, authors = standardized().train(is_training), network(AuthorsConv2d).train(is_training)
    batch = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    outputs: list[Tensor] = []

    for turn in range(3):
        if is_scope_between:
            with standardize_once(model), torch.no_grad():
                model(batch)
        for one, other in zip(weights_of(model), (authors[0].weight, authors[3].weight), strict=True):
            edit(one, 0.1 * turn)
            edit(other, 0.1 * turn)
        with mode():
            for _ in range(2):
                outputs.append(model(batch).detach().clone())
                assert_close(outputs[-1], authors(batch).detach().clone(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(outputs[1], outputs[-1], rtol=1e-3)  # the edits do something


@pytest.mark.parametrize("is_in_scopes", [False, True], ids=["plain loop", "each step in scopes"])
@pytest.mark.parametrize("is_teacher_training", [True, False], ids=["teacher trains", "teacher evaluates"])
def test_a_teacher_that_is_moved_through_data_follows_its_student(is_teacher_training, is_in_scopes):
    """20 steps of a momentum teacher: the losses and the weights are those of the authors' layer."""
    losses: dict[str, list[float]] = {"ours": [], "authors": []}
    models: dict[str, tuple[Any, Any]] = {
        "ours": (standardized(), standardized()),
        "authors": (network(AuthorsConv2d), network(AuthorsConv2d)),
    }
    for name, (student, teacher) in models.items():
        teacher.train(is_teacher_training)
        with torch.no_grad():
            for weight in teacher.parameters():
                weight.add_(values(weight, 0.2))
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(20):
            batch = torch.randn(2, 3, 7, 7, generator=generator, dtype=torch.float64)
            in_scopes = is_in_scopes and name == "ours"
            with standardize_once(teacher) if in_scopes else nullcontext(), torch.no_grad():
                target = teacher(batch)
            optimizer.zero_grad()
            with standardize_once(student) if in_scopes else nullcontext():
                loss = (student(batch + 0.1) - target).square().mean()
                loss.backward()
            optimizer.step()
            for mine, its in zip(student.parameters(), teacher.parameters(), strict=True):
                its.data.mul_(0.9).add_(mine.data, alpha=0.1)
            losses[name].append(loss.item())

    assert losses["ours"] == pytest.approx(losses["authors"], rel=1e-6)
    assert losses["ours"][0] > 0.01 and losses["ours"][0] != pytest.approx(losses["ours"][-1], rel=1e-2)
    raw = plain_state_dict(models["ours"][1])
    for name, weight in models["authors"][1].named_parameters():
        assert_close(raw[name], weight.detach(), rtol=1e-6, atol=1e-6)


# Layers whose own forward writes to their weight


class MaxNorm(nn.Conv2d):
    """Rows of a bounded norm, as of EEGNet; set in each forward."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
        return super().forward(input)


class Masked(nn.Conv2d):
    """Sees only what is above and to the left, as of PixelCNN."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data[:, :, 1:, 1:] *= 0
        return super().forward(input)


@pytest.mark.parametrize("conv", [MaxNorm, Masked])
def test_a_layer_that_writes_to_its_weight_computes_alike_in_training_and_evaluation_and_in_scopes(conv):
    """It writes to what it computes with in this forward, so that the raw weight stays: as with Composer's own."""
    torch.manual_seed(SEED)
    model: Any = nn.Sequential(conv(3, 8, 3), nn.GroupNorm(2, 8))
    apply_weight_standardization(model)
    batch = torch.randn(2, 3, 7, 7)
    raw = raw_weight(model[0]).detach().clone()

    expected = model(batch).detach()
    for is_training in (True, False):
        for context in (nullcontext(), standardize_once(model)):
            for mode in (nullcontext, torch.no_grad):
                with context if mode is nullcontext else nullcontext(), mode():
                    model.train(is_training)
                    assert torch.equal(model(batch), expected)
                    assert torch.equal(model(batch), expected)
    assert torch.equal(raw_weight(model[0]), raw)
