"""Which convolutions of a model would be standardized and why, to read before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ws_algorithm.layers import weight_shape
from ws_algorithm.patterns import Patterns
from ws_algorithm.selection import ConvolutionChoice, Layers, Predicate, Rules, Selection, select_convolutions
from ws_algorithm.tracing.execution import Found


@dataclass(frozen=True)
class ConvolutionRecord:
    """What Weight Standardization would do with one convolution.

    Args:
        index: Its position in the order of execution, from 0.
        name: Its first qualified name; ``""`` for the model itself.
        type: The name of its class.
        weight_shape: ``(out_channels, in_channels / groups, *kernel_size)``; ``()`` if it is lazy.
        fan_in: The number of weights of one output channel, over which they are standardized; 0 if it is lazy.
        normalized_by: The norm that follows it wherever it is used, as ``"name (class)"`` or as the name of a function;
            ``None`` if none does or none was found.
        standardized: Whether it is standardized, or would be.
        reason: Why, or why not.
        order: How its position was found: ``"traced"`` from forward itself, ``"observed"`` with an example input,
            ``"traced in parts"`` within a part of the model, the parts being in the order of definition, or
            ``"defined"``, by the order of definition alone.
    """

    index: int
    name: str
    type: str
    weight_shape: tuple[int, ...]
    fan_in: int
    normalized_by: str | None
    standardized: bool
    reason: str
    order: Found


def inspect_convolutions(
    module: nn.Module,
    n_last_layers_ignore: int = 0,
    *,
    layers: Layers = "all",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    predicate: Predicate | None = None,
    example_input: Any = None,
) -> list[ConvolutionRecord]:
    """Say of each convolution of a model what :func:`apply_weight_standardization` would do with it, and why.

    Args:
        module: The model; it is not changed, nor run.
        n_last_layers_ignore: As for :func:`~ws_algorithm.functional.apply_weight_standardization`, like the following.

    Returns:
        A record of each convolution, in the order of last use in forward. Those that are never used come first.

    Raises:
        ValueError: If an argument is not of the kind described, or a pattern matches no convolution.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 10, 1))
        >>> for record in inspect_convolutions(model, layers="normalized"):
        ...     print(record.name, record.standardized, record.reason)
        0 True a norm follows it
        3 False layers='normalized': no norm follows it
    """
    rules = Rules(n_last_layers_ignore, layers, include, exclude, predicate)
    return records_of(select_convolutions(module, rules, example_input))


def records_of(selection: Selection) -> list[ConvolutionRecord]:
    """A record of each convolution of a selection."""
    names = {layer: name for name, layer in selection.module.named_modules()}
    return [_record(index, choice, names) for index, choice in enumerate(selection.choices)]


def _record(index: int, choice: ConvolutionChoice, names: dict[nn.Module, str]) -> ConvolutionRecord:
    norm = choice.place.norm
    # A norm that forward makes, or that the model keeps in a list, has no name
    normalized_by = f"{names.get(norm, '')} ({type(norm).__name__})".lstrip() if isinstance(norm, nn.Module) else norm
    shape = weight_shape(choice.module)
    return ConvolutionRecord(
        index=index,
        name=choice.name,
        type=_class_of(choice.module).__name__,
        weight_shape=tuple(shape),
        fan_in=shape[1:].numel() if shape else 0,
        normalized_by=normalized_by,
        standardized=_ends_up_standardized(choice),
        reason=_reason(choice, normalized_by),
        order=choice.place.found,
    )


def _class_of(conv: nn.Module) -> type:
    """Not the class that torch injects for parametrizations, but the one below it."""
    return type(conv).__mro__[1] if parametrize.is_parametrized(conv) else type(conv)


def _ends_up_standardized(choice: ConvolutionChoice) -> bool:
    if choice.skipped_because is not None:
        return choice.skipped_because.startswith("already standardized")
    return choice.refused_because is None


def _reason(choice: ConvolutionChoice, normalized_by: str | None) -> str:
    if choice.skipped_because is not None:
        return choice.skipped_because
    if choice.refused_because is not None:
        return f"cannot be: {choice.refused_because}"
    if normalized_by is not None:
        return "a norm follows it"
    if choice.place.undecided:
        return "layers='all'; not known whether a norm follows it"
    if not choice.place.executed:
        return "layers='all', although forward does not use it"
    return "layers='all', although no norm follows it"
