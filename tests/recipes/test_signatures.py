import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Optional, Union

import pytest

from ws_algorithm.recipes.signatures import ArgumentError, check_arguments


class Thing:
    """What YAML cannot write."""


def build(
    size: int,
    rate: float = 0.5,
    *,
    label: str = "a",
    flag: bool = False,
    limit: Optional[int] = None,  # noqa: UP045
    count: int = None,  # type: ignore[assignment]
    kind: Literal["x", "y"] = "x",
    maybe: Literal["x"] | None = None,
    number: int | str = 1,
    time: Union[str, Thing] = "1ep",  # noqa: UP007
    thing: Thing | None = None,
    either: int | Thing | None = None,
    mixed: Literal["auto"] | int = 1,
    untyped=None,
) -> None: ...


def accepted(**arguments: object) -> dict[str, Any]:
    converted, errors = check_arguments(build, {"size": 1, **arguments})
    assert errors == []
    return converted


def mistakes(builder: Callable[..., Any], arguments: Mapping[str, Any], *supplied: str) -> list[tuple[str, str]]:
    return [(error.name, error.problem) for error in check_arguments(builder, arguments, supplied)[1]]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("size", 3, 3),
        ("size", "3", 3),
        ("rate", "1e-3", 1e-3),
        ("rate", 1, 1.0),
        ("label", "b", "b"),
        ("label", 3, "3"),
        ("flag", True, True),
        ("flag", "no", False),
        ("limit", 3, 3),
        ("limit", None, None),
        ("count", None, None),  # the default decides, whatever the annotation
        ("kind", "y", "y"),
        ("maybe", "x", "x"),
        ("maybe", None, None),
        ("number", 2, 2),
        ("number", "2", "2"),
        ("time", "2ep", "2ep"),
        ("thing", "anything", "anything"),
        ("thing", None, None),
        ("either", 3, 3),
        ("either", None, None),
        ("mixed", 2, 2),
        ("mixed", "auto", "auto"),
        ("untyped", {"a": [1]}, {"a": [1]}),
    ],
)
def test_values_that_fit_are_converted(name, value, expected):
    found = accepted(**{name: value})[name]

    assert found == expected
    assert type(found) is type(expected)


def test_what_is_not_given_is_not_filled_in():
    assert accepted() == {"size": 1}
    assert math.isinf(accepted(rate="inf")["rate"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", True),
        ("size", 1.5),
        ("size", "one"),
        ("size", None),
        ("size", [1]),
        ("size", {"a": 1}),
        ("rate", True),
        ("rate", "fast"),
        ("label", ["b"]),
        ("label", None),
        ("flag", "perhaps"),
        ("limit", "none"),
        ("count", "many"),
        ("kind", "z"),
        ("kind", None),
        ("maybe", "z"),
        ("number", 2.5),
        ("number", True),
        ("number", None),
        ("time", ["1ep"]),
        ("time", None),
    ],
)
def test_values_that_do_not_fit_are_quoted(name, value):
    ((argument, problem),) = mistakes(build, {"size": 1, name: value})

    assert argument == name
    assert problem.startswith(f"(={value!r}) ")
    assert "\n" not in problem


def test_an_unknown_argument_lists_the_valid_ones():
    def small(first: int, second: int = 1) -> None: ...

    converted, errors = check_arguments(small, {"first": 1, "secnod": 2})

    assert converted == {"first": 1}
    assert errors == [ArgumentError("secnod", "unknown argument", ("first", "second"))]


def test_required_arguments_are_missed():
    def two(first: int, second, third: int = 3) -> None: ...

    assert mistakes(two, {}) == [("first", "missing"), ("second", "missing")]
    assert mistakes(two, {"first": "???", "second": 1}) == [("first", "missing")]
    assert mistakes(two, {"first": 1, "second": 2, "third": "???"}) == [("third", "missing")]


def test_every_mistake_is_listed():
    found = mistakes(build, {"rate": "fast", "sizes": 1, "kind": "z"})

    assert [name for name, _ in found] == ["rate", "sizes", "kind", "size"]


def test_supplied_arguments_may_not_be_given_and_are_not_missed():
    def loader(split: str, batch_size: int) -> None: ...

    assert mistakes(loader, {"split": "test"}, "batch_size") == []
    _, errors = check_arguments(loader, {"split": "test", "batch_size": 1}, ("batch_size",))
    assert errors == [ArgumentError("batch_size", "unknown argument", ("split",))]


@pytest.mark.parametrize(
    "annotation",
    [
        list[int],
        tuple[float, float],
        dict[str, int],
        Sequence[str],
        Iterable[int],
        Mapping[str, int],
        Collection[int],
        list,
        list[int] | None,
        str | Sequence[str],
        Any,
        Any | None,
        Callable[[int], int],
        Thing,
    ],
)
@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, "text", 3])
def test_what_no_scalar_describes_is_passed_on(annotation, value):
    def builder(items) -> None: ...

    builder.__annotations__ = {"items": annotation}

    assert check_arguments(builder, {"items": value}) == ({"items": value}, [])


def test_keyword_arguments_of_any_name_are_passed_on():
    def open_ended(first: int, **others: int) -> None: ...

    assert check_arguments(open_ended, {"first": "1", "whatever": [2]}) == ({"first": 1, "whatever": [2]}, [])
    assert mistakes(open_ended, {"whatever": 1}) == [("first", "missing")]


def test_positional_arguments_cannot_be_given_by_name():
    def positional(value: int = 1, /, *others: int, named: int = 2) -> None: ...

    assert check_arguments(positional, {"named": "3"}) == ({"named": 3}, [])
    assert [name for name, _ in mistakes(positional, {"value": 1, "others": 2})] == ["value", "others"]


def test_classes_are_checked_by_their_constructor():
    class Base:
        def __init__(self, size: int, rate: float = 0.1) -> None: ...

    class Derived(Base):
        pass

    for cls in (Base, Derived):
        assert check_arguments(cls, {"size": "3", "rate": "1e-3"}) == ({"size": 3, "rate": 1e-3}, [])
        assert mistakes(cls, {"self": 1, "size": 1})[0] == ("self", "unknown argument")


def test_callables_without_annotations_are_checked_by_name():
    partial = functools.partial(build, size=3)

    def forward(size: "Nowhere", rate: float = 1.0) -> None: ...  # noqa: F821  # type: ignore

    for builder in (partial, forward):
        assert mistakes(builder, {"size": "x", "rates": 1}) == [("rates", "unknown argument")]
