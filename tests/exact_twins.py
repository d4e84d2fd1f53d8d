"""Equal models, one inside ``standardize_once`` and one not, whose loops leave the same gradients but for rounding.

Without the context autograd goes through the standardization in every backward. Rounding differs: 1e-12 of the largest
entry of a gradient in float64, 1e-6 in float32.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gain_and_shift import gain_and_shift
from torch import Tensor, nn

from ws_algorithm import FORMULAS, apply_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight, register_weight_standardizer

SEED = 5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
CONVOLUTIONS = (0, 3, 6)  # of `tiny`

Context = Callable[[nn.Module], contextlib.AbstractContextManager]
Loop = Callable[[Any, Context], Any]

formulas = pytest.mark.parametrize("formula", FORMULAS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def exactly(module: nn.Module) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def tiny(formula: str = "composer", dtype: torch.dtype = torch.float64, standardize: bool = True) -> Any:
    """Convolutions ``0``, ``3`` (of two groups) and ``6``, all standardized; the same weights at every call."""
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh()]
    body += [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.GroupNorm(2, 6), nn.Tanh()]
    model = nn.Sequential(*body, nn.Conv2d(6, 2, 3))
    if standardize:
        apply_weight_standardization(model, formula=formula)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float64, count: int = 3) -> list[Tensor]:
    """Micro-batches of two images of 8 pixels."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def l2(model: Any) -> Tensor:
    return 0.1 * torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


KINDS: dict[str, Callable[[], Any]] = {
    "Conv1d": lambda: [nn.Conv1d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv1d(6, 4, 3, bias=False)],
    "Conv2d": lambda: [nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False)],
    "Conv3d": lambda: [nn.Conv3d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv3d(6, 4, (1, 3, 1))],
    "groups": lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=2)],
    "sizes": lambda: [nn.Conv2d(4, 70, (1, 3)), nn.GroupNorm(7, 70), nn.Tanh(), nn.Conv2d(70, 3, 1)],
}
LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def of_kind(kind: str, formula: str, dtype: torch.dtype, is_channels_last: bool = False) -> Any:
    torch.manual_seed(SEED)
    model: Any = nn.Sequential(*KINDS[kind]())
    apply_weight_standardization(model, formula=formula)
    if is_channels_last:
        model.to(memory_format=LAYOUTS[raw_weight(model[0]).ndim])
    return model.to(dtype)


class Pair(nn.Module):
    """Two convolutions of one shape, and one that uses the raw weight of the first as it is."""

    def __init__(self, formulas: tuple[str, str], are_tied: bool, is_plain_shared: bool) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.second, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        if are_tied:
            self.second.weight = self.first.weight
        if is_plain_shared:
            self.plain.weight = self.first.weight
        register_weight_standardizer(self.first, formulas[0])
        register_weight_standardizer(self.second, formulas[1])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + torch.tanh(self.plain(x))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of the gradient of each parameter."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_near(actual: Any, expected: Any, tolerance: float | None = None, name: str = "") -> None:
    """The same structure, with tensors that differ by rounding only; `tolerance` is relative to the largest entry."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), name
        kinds = [(tensor.dtype, tensor.shape, order_in_memory(tensor)) for tensor in (actual, expected)]
        assert kinds[0] == kinds[1], f"{name}: {kinds}"
        allowed = TOLERANCES[expected.dtype] if tolerance is None else tolerance
        difference, largest = (actual - expected).abs().max(), expected.abs().max()
        assert difference <= allowed * largest, f"{name}: {difference:.3g} of {largest:.3g}"
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), name
        for key in expected:
            assert_near(actual[key], expected[key], tolerance, f"{name} {key}")
    elif isinstance(expected, (list, tuple)):
        for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert_near(one, other, tolerance, f"{name} {index}")
    else:
        assert actual == expected, name


def order_in_memory(tensor: Tensor) -> list[int]:
    """The strides, less those of dimensions with one element, which mean nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check(build: Callable[[], Any], loop: Loop, tolerance: float | None = None) -> Any:
    """Run `loop` exactly and in the context, compare gradients and what it returns, and return the latter model."""
    exact, once = build(), build()
    expected, actual = loop(exact, exactly), loop(once, standardize_once)
    assert any(parameter.grad is not None for parameter in exact.parameters()) or expected is not None
    assert_near(gradients(once), gradients(exact), tolerance)
    assert_near(actual, expected, tolerance)
    assert_exact_now(once)
    return once


def assert_exact_now(model: Any) -> None:
    """After the context the weights are those of the raw weights, by plain autograd."""
    for layer in model.modules():
        if hasattr(layer, "parametrizations"):
            raw: Any = raw_weight(layer)
            formula = layer.parametrizations["weight"][0].formula
            weight, expected = layer.weight, standardize_weight(raw, formula, **gain_and_shift(layer))
            assert torch.equal(weight, expected)
            if raw.requires_grad:
                gradients_of_raw = [torch.autograd.grad(value.pow(3).sum(), raw)[0] for value in (weight, expected)]
                assert torch.equal(*gradients_of_raw)
