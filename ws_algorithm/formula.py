"""Weight Standardization as functions of tensors.

Every convolution weight ``W`` is seen as rows, one row of ``n`` weights (the fan-in) per output channel:

.. math:: \\hat{W}_{o} = \\frac{W_{o} - \\mu_{o}}{s_{o}}

What the published systems disagree on is the scale ``s``: whether the variance divides by ``n`` or by ``n - 1``,
how large ``eps`` is, and whether it is added to the variance or to the standard deviation. Two of them multiply the
standardized rows by a gain again. Each variant is one :class:`Formula`.

Source: Qiao et al. 2019, https://arxiv.org/abs/1903.10520, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Rescaling = Literal["affine", "scaled"]


@dataclass(frozen=True)
class Formula:
    """One published way to compute the scale ``s`` of a row, and what the standardized row is multiplied by again.

    ``s = sqrt(var + eps)`` when ``eps_inside_root``, else ``s = sqrt(var) + eps``.

    Args:
        eps: Added to the variance or to the standard deviation. Must be positive.
        eps_inside_root: Whether ``eps`` is added to the variance (under the root) or to its root.
        unbiased: Whether the variance divides by ``n - 1`` (Bessel's correction) instead of ``n``.
        rescaling: ``"affine"`` to compute with ``gain * standardized + shift``, where gain and shift are the ``s`` and
            the mean that the row had at first, and do not learn; ``"scaled"`` to compute with
            ``gain * n**-0.5 * standardized``, where the gain is 1 at first, and learns. Default: ``None``, for neither.

    Raises:
        ValueError: If `eps` is not a positive number, or `rescaling` is none of these.
    """

    eps: float
    eps_inside_root: bool
    unbiased: bool
    rescaling: Rescaling | None = None

    def __post_init__(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 < self.eps < float("inf"):
            raise ValueError(
                f"`eps` (={self.eps!r}) must be positive and finite: with 0, a constant filter would divide by zero."
            )
        if self.rescaling is not None and self.rescaling not in get_args(Rescaling):
            raise ValueError(f"`rescaling` (={self.rescaling!r}) must be 'affine', 'scaled' or None.")


FORMULAS: dict[str, Formula] = {
    # mosaicml/composer, algorithms/weight_standardization
    "composer": Formula(eps=1e-10, eps_inside_root=True, unbiased=False),
    # joe-siyuan-qiao/WeightStandardization (PyTorch layer); equals mmcv's ConvWS2d
    "paper": Formula(eps=1e-5, eps_inside_root=False, unbiased=True),
    # joe-siyuan-qiao/WeightStandardization (TensorFlow layer); csrhddlam/dgcnn
    "tensorflow": Formula(eps=1e-5, eps_inside_root=False, unbiased=False),
    # huggingface/pytorch-image-models, StdConv2d; its BiT models use eps 1e-8
    "timm": Formula(eps=1e-6, eps_inside_root=True, unbiased=False),
    # google-research/big_transfer, StdConv2d
    "bit": Formula(eps=1e-10, eps_inside_root=True, unbiased=False),
    # open-mmlab/mmcv, ConvAWS2d
    "affine": Formula(eps=1e-5, eps_inside_root=True, unbiased=True, rescaling="affine"),
    # Brock et al. 2021, https://arxiv.org/abs/2101.08692; huggingface/pytorch-image-models, ScaledStdConv2d
    "scaled": Formula(eps=1e-6, eps_inside_root=True, unbiased=False, rescaling="scaled"),
}


def resolve_formula(formula: str | Formula) -> Formula:
    """The :class:`Formula` of a name, or `formula` itself when it already is one.

    Raises:
        ValueError: If `formula` is neither a known name nor a :class:`Formula`.

    Example:
        >>> resolve_formula("paper").unbiased
        True
    """
    if isinstance(formula, Formula):
        return formula
    if isinstance(formula, str) and formula in FORMULAS:
        return FORMULAS[formula]
    raise ValueError(f"`formula` (={formula!r}) must be one of {', '.join(FORMULAS)}, or a `Formula`.")


def _check_rescaling(weight: Tensor, formula: Formula, gain: Tensor | None, shift: Tensor | None) -> None:
    shape = (weight.shape[0], *[1] * (weight.ndim - 1))
    for name, part, takers in (("gain", gain, ("affine", "scaled")), ("shift", shift, ("affine",))):
        if part is None:
            continue
        if formula.rescaling not in takers:
            raise ValueError(f"`{name}` was given, but {formula!r} has none; those with `rescaling` of {takers} have.")
        if not isinstance(part, Tensor) or tuple(part.shape) != shape:
            got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
            raise ValueError(f"`{name}` must be a tensor of shape {shape}, one number for each channel; got {got}.")


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def check_weight(weight: Tensor) -> None:
    """Raise ``ValueError`` unless `weight` has rows to standardize and a floating-point dtype of 16 bits or more."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"`weight` must be a tensor, got {type(weight).__name__}.")
    if weight.ndim < 2:
        raise ValueError(
            f"`weight` must have at least two dimensions (output channels first), got shape {tuple(weight.shape)}. "
            "If FSDP has flattened it, standardize before wrapping."
        )
    if weight.dtype not in _DTYPES:
        raise ValueError(f"`weight` must be floating-point, got {weight.dtype}. Standardize before quantizing.")


def standardize_weight(
    weight: Tensor,
    formula: str | Formula = "composer",
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""Give every output channel of a convolution weight zero mean and unit variance.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) / s_{o}

    with the mean :math:`\mu` and the scale :math:`s` of :class:`Formula` over all dimensions but the first. The formula
    ``affine`` goes on to :math:`\mathrm{gain}_o \hat{W}_o + \mathrm{shift}_o`, and ``scaled`` to
    :math:`\mathrm{gain}_o \, n^{-1/2} \hat{W}_o`, with a gain of 1 and a shift of 0 unless they are given.
    Differentiable to second order. Statistics are computed in float32 for float16 and bfloat16 weights (an ``eps`` of
    1e-10 is 0 in float16) and in the weight's own precision otherwise. A row of one weight, or of equal weights,
    becomes 0.

    Args:
        weight: Shape ``(out_channels, in_channels / groups, *kernel_size)``; any number of dimensions from 2 on.
        formula: A name in ``FORMULAS`` or a :class:`Formula`. Default: ``"composer"``.
        gain: Of ``affine`` and ``scaled``: one factor for each output channel, as ``conv.parametrizations.weight[1]``
            has it; shape ``(out_channels, 1, ...)`` of as many dimensions as `weight`. Default: ``None``, for 1.
        shift: Of ``affine``: one summand for each output channel, in the same shape. Default: ``None``, for 0.

    Returns:
        The standardized weight: same shape and dtype; contiguous and ``channels_last`` layouts are kept.

    Raises:
        ValueError: If `weight` is no tensor, has fewer than two dimensions or an integer or 8-bit dtype, `formula` is
            not known, or `gain` or `shift` has another shape or is none of the formula's.

    Source: https://arxiv.org/abs/1903.10520, equations 7 and 8.

    Example:
        >>> standardized = standardize_weight(torch.tensor([[1.0, 3.0]]))
        >>> torch.allclose(standardized, torch.tensor([[-1.0, 1.0]]))  # mean 2, standard deviation 1
        True
    """
    formula = resolve_formula(formula)
    check_weight(weight)
    _check_rescaling(weight, formula, gain, shift)
    return rescale(standardize(weight, formula), formula, gain, shift)


def standardize(weight: Tensor, formula: Formula) -> Tensor:
    """The standardized `weight`, before gain and shift."""
    if is_one_kernel(weight, formula):
        return F.layer_norm(weight, weight.shape[1:], eps=formula.eps)
    order = _dims_in_memory_order(weight)
    rows = _rows_of(weight, order)
    return _shaped_like(weight, order, _standardize_rows(_precise(rows), formula).to(rows.dtype))


def rescale(standardized: Tensor, formula: Formula, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """A standardized weight with gain and shift, in its own dtype: computed in the highest precision of the three."""
    if formula.rescaling is None:
        return standardized
    if formula.rescaling == "scaled":
        factor = max(standardized.shape[1:].numel(), 1) ** -0.5
        return (standardized * (factor if gain is None else gain * factor)).to(standardized.dtype)
    rescaled = standardized if gain is None else standardized * gain
    return (rescaled if shift is None else rescaled + shift).to(standardized.dtype)


def scale_and_mean(weight: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """The scale ``s`` and the mean of each row, in float32 or the weight's own higher precision.

    Shape ``(out_channels, 1, ...)`` of as many dimensions as `weight`.
    """
    rows = _precise(_rows_of(weight, _dims_in_memory_order(weight)))
    shape = (weight.shape[0], *[1] * (weight.ndim - 1))
    if rows.numel() == 0:
        return rows.new_ones(shape), rows.new_zeros(shape)
    mean, scale = _statistics_of(rows, formula)
    return scale.view(shape), mean.view(shape)


class Standardized(NamedTuple):
    """A standardized weight, and the statistics of the raw one by which gradients are projected.

    Args:
        weight: The standardized weight, of the raw one's shape and layout.
        mean: The mean of each row, shape ``(out_channels,)``, in float32 or the raw weight's own higher precision.
        reciprocal_scale: ``1 / s`` of each row, in the same shape and precision.
    """

    weight: Tensor
    mean: Tensor
    reciprocal_scale: Tensor


@torch.no_grad()
def standardize_with_statistics(weight: Tensor, formula: Formula, dtype: torch.dtype) -> Standardized:
    """The standardized `weight` in `dtype`, with its statistics and without a graph.

    The weight equals :func:`standardize` rounded to `dtype`.
    """
    order = _dims_in_memory_order(weight)
    rows = _precise(_rows_of(weight, order))
    if _is_layer_norm(formula) and rows.numel() > 0 and not rows.is_complex():
        standardized, mean, reciprocal_scale = torch.native_layer_norm(rows, rows.shape[1:], None, None, formula.eps)
    else:
        mean, scale = _statistics_of(rows, formula)
        standardized, reciprocal_scale = _standardize_rows(rows, formula), 1 / scale
    # by way of the weight's own dtype, as autocast would round it
    standardized = _shaped_like(weight, order, standardized).to(weight.dtype).to(dtype)
    return Standardized(standardized, mean.flatten(), reciprocal_scale.flatten())


@torch.no_grad()
def project_gradient(gradient: Tensor, weight: Tensor, statistics: Standardized, formula: Formula) -> Tensor:
    r"""The gradient with respect to the raw weight, from the one with respect to the standardized weight.

    .. math:: \frac{dL}{dW} = \frac{1}{s} (g - \overline{g}) - \frac{c}{m q s^2} \sum g c, \qquad c = W - \mu

    per row, with :math:`m` the divisor of the variance and :math:`q = s` where ``eps`` is inside the root, else the
    standard deviation. Linear in the gradient, and dependent on nothing else but the raw weight: the projection of a
    sum is the sum of the projections.

    Args:
        gradient: With respect to the standardized weight; shape of `weight`.
        weight: The raw weight.
        statistics: Of `weight`.
        formula: That it was standardized by.

    Returns:
        Shape and layout of `weight`, dtype of `gradient`.
    """
    order = _dims_in_memory_order(weight)
    rows, g = _precise(_rows_of(weight, order)), _precise(_rows_of(gradient, order))
    rows = rows.to(g.dtype)
    mean, r = (part.to(g.dtype).unsqueeze(1) for part in statistics[1:])
    if _is_layer_norm(formula) and rows.numel() > 0 and not rows.is_complex():
        backward: Any = torch.ops.aten.native_layer_norm_backward
        projected = backward(g, rows, rows.shape[1:], mean, r, None, None, [True, False, False])[0]
    else:
        projected = _project_rows(g, (rows - mean).mul_(r), r, formula)
    return _shaped_like(weight, order, projected).to(gradient.dtype)


def _project_rows(g: Tensor, standardized: Tensor, r: Tensor, formula: Formula) -> Tensor:
    """The formula of :func:`project_gradient` in terms of the standardized rows, ``c r``."""
    n = g.shape[1]
    divisor = max(n - 1, 1) if formula.unbiased else n
    deviation = 1 / r if formula.eps_inside_root else 1 / r - formula.eps
    share = (g * standardized.conj()).sum(1, keepdim=True) / (divisor * deviation * r)
    share = torch.where(deviation > 0, share, 0)  # a constant row has no direction to lose
    return r * (g - g.mean(1, keepdim=True) - standardized * share)


def _is_layer_norm(formula: Formula) -> bool:
    return formula.eps_inside_root and not formula.unbiased


def is_one_kernel(weight: Tensor, formula: Formula) -> bool:
    """Whether ``layer_norm`` computes the whole of it without a change of shape or dtype."""
    if not _is_layer_norm(formula) or weight.dtype not in (torch.float32, torch.float64):
        return False
    return weight.is_contiguous() and weight.numel() > 0


def _dims_in_memory_order(weight: Tensor) -> list[int]:
    """Dimension 0, then the others from the largest stride to the smallest.

    Row statistics do not depend on the order inside a row, and in this order flattening a ``channels_last`` weight
    copies nothing and the result keeps that layout.
    """
    if weight.is_contiguous():
        return list(range(weight.ndim))
    return [0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True)]


def _rows_of(weight: Tensor, order: list[int]) -> Tensor:
    """The matrix ``(O, n)``: a view whenever the weight is dense."""
    return weight.permute(order).reshape(weight.shape[0], weight.shape[1:].numel())


def _shaped_like(weight: Tensor, order: list[int], rows: Tensor) -> Tensor:
    """Rows of `weight` back in its shape and layout."""
    shape = [weight.shape[dim] for dim in order]
    return rows.reshape(shape).permute([order.index(dim) for dim in range(weight.ndim)])


def _precise(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _standardize_rows(rows: Tensor, formula: Formula) -> Tensor:
    """Standardize each row of a matrix ``(O, n)``."""
    n = rows.shape[1]
    if rows.numel() == 0:
        return rows.clone()
    if _is_layer_norm(formula) and not rows.is_complex():
        return F.layer_norm(rows, (n,), eps=formula.eps)  # one fused kernel forward, one backward
    correction = 1 if formula.unbiased and n > 1 else 0
    if formula.eps_inside_root:
        var, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=correction)
        return (rows - mean) / torch.sqrt(var + formula.eps)
    # std_mean rather than the root of var_mean: its gradient at a constant row is 0 instead of NaN
    std, mean = torch.std_mean(rows, dim=1, keepdim=True, correction=correction)
    return (rows - mean) / (std + formula.eps)


def _statistics_of(rows: Tensor, formula: Formula) -> tuple[Tensor, Tensor]:
    """The mean and the scale ``s`` of each row, shape ``(O, 1)``."""
    correction = 1 if formula.unbiased and rows.shape[1] > 1 else 0
    var, mean = torch.var_mean(rows, dim=1, keepdim=True, correction=correction)
    scale = torch.sqrt(var + formula.eps) if formula.eps_inside_root else torch.sqrt(var) + formula.eps
    return mean, scale
