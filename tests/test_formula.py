"""The formulas against an oracle in float64 that is written out here once more."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ws_algorithm.formula import FORMULAS, Formula, resolve_formula, standardize_weight

SHAPES = [(1, 2, 1), (5, 2), (8, 3, 3), (64, 32, 3, 3), (6, 1, 3, 3), (4, 2, 3, 3, 3)]
FAN_IN_1 = [(1, 1, 1), (7, 1), (4, 1, 1, 1), (3, 1, 1, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# The scale of a row from the sum of its squared deviations and its length; of "scaled", times the root of that length
SCALES = {
    "composer": lambda squares, n: (squares / n + 1e-10) ** 0.5,
    "paper": lambda squares, n: (squares / (n - 1)) ** 0.5 + 1e-5,
    "tensorflow": lambda squares, n: (squares / n) ** 0.5 + 1e-5,
    "timm": lambda squares, n: (squares / n + 1e-6) ** 0.5,
    "bit": lambda squares, n: (squares / n + 1e-10) ** 0.5,
    "affine": lambda squares, n: (squares / (n - 1) + 1e-5) ** 0.5,
    "scaled": lambda squares, n: (squares / n + 1e-6) ** 0.5 * n**0.5,
}
# The slope 1 / s of a row of 27 without any spread: 1 / sqrt(eps) inside the root, 1 / eps outside it
SLOPES_WITHOUT_SPREAD = {
    **{"composer": 1e5, "paper": 1e5, "tensorflow": 1e5, "timm": 1e3, "bit": 1e5},
    **{"affine": 1e5**0.5, "scaled": 1e3 / 27**0.5},
}


def oracle(weight: Tensor, scale) -> Tensor:
    rows = weight.to(torch.complex128 if weight.is_complex() else torch.float64).reshape(weight.shape[0], -1)
    n = rows.shape[1]
    deviations = rows - rows.sum(1, keepdim=True) / n
    squares = deviations.abs().square().sum(1, keepdim=True)
    return (deviations / scale(squares, n)).reshape(weight.shape)


def test_every_formula_has_an_oracle():
    assert list(SCALES) == list(SLOPES_WITHOUT_SPREAD) == list(FORMULAS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_values_against_the_oracle(name, shape, dtype):
    weight = (torch.randn(shape, dtype=torch.float64) * 0.05 + 0.02).to(dtype)

    standardized = standardize_weight(weight, name)

    assert standardized.dtype == dtype
    assert_close(standardized, oracle(weight, SCALES[name]).to(dtype))


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_against_the_oracle(name):
    weight = torch.randn(8, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(weight)

    (actual,) = torch.autograd.grad(standardize_weight(weight, name), weight, grad)

    (expected,) = torch.autograd.grad(oracle(weight, SCALES[name]), weight, grad)
    assert_close(actual, expected)


def test_the_default_is_composer():
    weight = torch.randn(8, 4, 3, 3)

    assert torch.equal(standardize_weight(weight), standardize_weight(weight, "composer"))


def test_an_own_formula():
    formula = Formula(eps=0.01, eps_inside_root=True, unbiased=True)
    weight = torch.randn(8, 4, 3, 3)

    assert_close(
        standardize_weight(weight, formula),
        oracle(weight, lambda squares, n: (squares / (n - 1) + 0.01) ** 0.5).float(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", FAN_IN_1, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_row_of_one_weight_becomes_zero(name, shape, dtype):
    weight: Any = torch.randn(shape).to(dtype).requires_grad_()

    standardized = standardize_weight(weight, name)
    standardized.backward(torch.ones_like(standardized))

    assert torch.equal(standardized, torch.zeros(shape, dtype=dtype))
    assert torch.equal(weight.grad, torch.zeros(shape, dtype=dtype))  # constant function


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_constant_filters_have_zero_output_and_a_finite_gradient(name, dtype, value):
    weight = torch.full((4, 3, 3, 3), value, dtype=dtype, requires_grad=True)
    # Small enough for the gradient, up to 1e5 times as large, to be a float16 (below 65504)
    grad = (torch.rand(4, 3, 3, 3) - 0.5).to(dtype)

    standardized = standardize_weight(weight, name)
    standardized.backward(grad)

    assert torch.equal(standardized, torch.zeros_like(standardized))
    # dL/dW = (g - mean(g)) / s where the standardized weight is 0
    centred = grad.double() - grad.double().flatten(1).mean(1)[:, None, None, None]
    expected = SLOPES_WITHOUT_SPREAD[name] * centred
    rtol = {torch.float64: 1e-7, torch.float32: 1.3e-6, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}[dtype]
    # The slope multiplies the rounding of mean(g), and in layer_norm's backward also that of sums of `value`
    atol = (1e-6 if abs(value) < 1 else 1e-3) * SLOPES_WITHOUT_SPREAD[name]
    assert_close(weight.grad, expected.to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FORMULAS)
def test_first_and_second_derivatives(name, layout):
    weight = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_()

    assert torch.autograd.gradcheck(lambda w: standardize_weight(w, name), weight)
    assert torch.autograd.gradgradcheck(lambda w: standardize_weight(w, name), weight)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    "shape, layout", [((8, 4, 3, 3), torch.channels_last), ((8, 4, 2, 3, 3), torch.channels_last_3d)], ids=str
)
def test_channels_last_is_kept(name, shape, layout):
    weight = torch.randn(shape).to(memory_format=layout)

    standardized = standardize_weight(weight, name)

    assert standardized.stride() == weight.stride()
    assert_close(standardized.contiguous(), standardize_weight(weight.contiguous(), name))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w[:, ::2],
        lambda w: w.transpose(2, 3),
        lambda w: w.transpose(0, 1),
        lambda w: w[:1].expand(5, -1, -1, -1),
        lambda w: w.flip(3)[..., 1:],
    ],
    ids=["strided", "transposed kernel", "transposed channels", "expanded", "cut"],
)
def test_any_view(view):
    weight = view(torch.randn(8, 4, 3, 3))

    assert_close(standardize_weight(weight), oracle(weight, SCALES["composer"]).float())


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(name, autocast_dtype):
    weight = torch.randn(8, 4, 3, 3)
    expected = standardize_weight(weight, name)

    with torch.autocast("cpu", dtype=autocast_dtype):
        actual = standardize_weight(weight, name)

    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_complex_weights(name, dtype):
    weight = torch.randn(6, 2, 3, dtype=dtype)

    assert_close(standardize_weight(weight, name), oracle(weight, SCALES[name]).to(dtype))


@pytest.mark.parametrize("name", FORMULAS)
def test_complex_gradient(name):
    weight = torch.randn(2, 2, 2, dtype=torch.complex128, requires_grad=True)

    assert torch.autograd.gradcheck(lambda w: standardize_weight(w, name), weight)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_too_few_dimensions(shape):
    with pytest.raises(ValueError, match=r"`weight` must have at least two dimensions"):
        standardize_weight(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_a_weight_that_is_not_floating_point(dtype):
    with pytest.raises(ValueError, match=rf"`weight` must be floating-point, got {dtype}"):
        standardize_weight(torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("formula", ["Composer", "", None, 1e-5, ["paper"], Formula])
def test_unknown_formula(formula):
    with pytest.raises(ValueError, match=f"`formula`.*{', '.join(SCALES)}, or a `Formula`"):
        standardize_weight(torch.randn(2, 3), formula)


# A YAML file gives the string: 1e-5 without a dot is none of YAML 1.1's numbers
@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, float("nan"), "1e-5", None], ids=repr)
def test_eps_must_be_a_positive_number(eps):
    with pytest.raises(ValueError, match="`eps`.*must be positive"):
        Formula(eps=eps, eps_inside_root=True, unbiased=False)


def test_resolve_formula():
    formula = Formula(eps=1e-3, eps_inside_root=False, unbiased=True)

    assert resolve_formula(formula) is formula
    assert {name: resolve_formula(name) for name in FORMULAS} == FORMULAS


def random_weights() -> st.SearchStrategy[Tensor]:
    """Float64 weights of any layout of a convolution, with some spread in every row."""
    kernels = st.lists(st.integers(1, 3), min_size=1, max_size=3)
    return st.builds(
        lambda out, width, kernel, seed: torch.randn(
            (out, width, *kernel), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        ),
        st.integers(1, 5),
        st.integers(2, 5),
        kernels,
        st.integers(0, 2**31),
    ).filter(lambda weight: bool(weight.flatten(1).std(1).min() > 1e-2))


@given(weight=random_weights(), name=st.sampled_from(list(FORMULAS)))
def test_the_mean_of_every_row_is_zero(weight, name):
    assert standardize_weight(weight, name).flatten(1).mean(1).abs().max() < 1e-12


@given(weight=random_weights())
def test_the_biased_deviation_of_every_row_is_one(weight):
    # std = sqrt(var / (var + 1e-10)), and var > 1e-5 here
    deviation = standardize_weight(weight, "composer").flatten(1).std(1, correction=0)

    assert_close(deviation, torch.ones_like(deviation), rtol=1e-5, atol=0)


@given(
    weight=random_weights(),
    name=st.sampled_from(list(FORMULAS)),
    factor=st.floats(0.1, 10),
    shift=st.floats(-10, 10),
)
def test_shift_and_positive_scale_do_not_matter(weight, name, factor, shift):
    moved = factor * weight + shift
    assume(moved.flatten(1).std(1).min() > 1e-2)

    # A row of deviation d is divided by d + eps or sqrt(d^2 + eps): by d, to a relative eps / d or eps / (2 d^2).
    # Largest for the 1e-5 of "affine", whose d has Bessel's correction and is above 1e-2: 5e-2
    assert_close(standardize_weight(moved, name), standardize_weight(weight, name), rtol=5e-2, atol=1e-9)


@given(weight=random_weights())
def test_standardizing_twice_equals_once(weight):
    once = standardize_weight(weight, "composer")

    # var > 1e-5 becomes 1 to a relative 1e-5
    assert_close(standardize_weight(once, "composer"), once, rtol=1e-5, atol=1e-12)
