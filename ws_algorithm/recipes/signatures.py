"""Keyword arguments from YAML checked against the signature of the builder that will be called with them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MISSING_VALUE = "???"  # how YAML leaves a value to be filled in


@dataclasses.dataclass(frozen=True)
class ArgumentError:
    """A mistake in one argument.

    Args:
        name: The argument.
        problem: What is wrong with it.
        valid: The names to choose from, if the name itself is unknown.
    """

    name: str
    problem: str
    valid: tuple[str, ...] = ()


def check_arguments(
    builder: Callable[..., Any], arguments: Mapping[str, Any], supplied: Collection[str] = ()
) -> tuple[dict[str, Any], list[ArgumentError]]:
    """Check arguments by name and, where the builder's annotations allow it, by type.

    Args:
        builder: A function or class.
        arguments: What a recipe gives.
        supplied: Names that the caller fills in itself; a recipe may not give them.

    Returns:
        The arguments converted to the annotated types (``"1e-3"`` to ``0.001``), and the mistakes.
    """
    parameters = inspect.signature(builder).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind in _NAMED_KINDS and name not in supplied}
    hints = _type_hints(builder)
    converted, errors = {}, []
    for name, value in arguments.items():
        if name not in named and not open_ended:
            errors.append(ArgumentError(name, "unknown argument", tuple(named)))
        elif value == MISSING_VALUE:
            errors.append(ArgumentError(name, "missing"))
        elif value is None and name in named and named[name].default is None:
            converted[name] = None  # whatever the annotation says
        elif isinstance(value, float) and math.isnan(value):
            errors.append(ArgumentError(name, "(=nan) must be a number"))
        else:
            try:
                converted[name] = _convert(value, hints.get(name, Any))
            except OmegaConfBaseException as error:
                problem = str(error).partition("\n")[0]
                errors.append(ArgumentError(name, f"(={value!r}) {problem[0].lower()}{problem[1:]}"))
    required = [name for name, parameter in named.items() if parameter.default is inspect.Parameter.empty]
    errors += [ArgumentError(name, "missing") for name in required if name not in arguments]
    return converted, errors


_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _type_hints(builder: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(builder.__init__ if isinstance(builder, type) else builder)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can resolve
        return {}


def _convert(value: Any, annotation: Any) -> Any:
    value_type = _yaml_type(annotation)
    if value_type is Any:
        return value
    single = dataclasses.make_dataclass("Arguments", [("value", value_type)])
    return OmegaConf.to_container(OmegaConf.structured(single(value)))["value"]  # pyright: ignore


def _yaml_type(annotation: Any) -> Any:
    """The part of an annotation that a YAML value can have: scalars, ``Literal`` and unions of them, else ``Any``."""
    if annotation in _SCALARS or typing.get_origin(annotation) is Literal:
        return annotation
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return Any
    members = typing.get_args(annotation)
    if any(member is Any or _holds_items(member) for member in members):
        return Any
    scalars = tuple(member for member in members if member in _SCALARS or member is type(None))
    literals = [member for member in members if typing.get_origin(member) is Literal]
    if literals:
        return Union[literals[0], None] if type(None) in scalars and len(scalars) == 1 else Any  # noqa: UP007
    return Union[scalars] if set(scalars) - {type(None)} else Any  # noqa: UP007


_SCALARS = (int, float, bool, str)
_CONTAINERS = (list, tuple, dict, set, Sequence, Mapping, Iterable, Collection)


def _holds_items(annotation: Any) -> bool:
    """Whether an annotation is a sequence or mapping, which YAML writes as a list or mapping."""
    return (typing.get_origin(annotation) or annotation) in _CONTAINERS
