"""By which formulas a checkpoint of Composer was trained: what it keeps of its algorithms."""

from __future__ import annotations

import ast
from typing import Any

from ws_algorithm.formula import Formula


def recorded_formulas(algorithms: Any) -> list[str | Formula | None]:
    """The formula of each ``WeightStandardization`` in ``state["algorithms"]`` of a checkpoint, in their order.

    Composer keeps the ``repr`` of an algorithm. A formula that cannot be read from it, as that of a class of the user,
    is its text.

    Returns:
        Names of formulas or formulas; ``None`` where none is recorded, as by Composer's own algorithm, whose formula is
        ``"composer"``. Of a checkpoint without the algorithm, or of another kind, an empty list.
    """
    entries = algorithms.items() if isinstance(algorithms, dict) else algorithms
    found: list[str | Formula | None] = []
    for entry in entries if isinstance(algorithms, dict | list | tuple) else ():
        name, *kept = entry if isinstance(entry, list | tuple) and entry else (None,)
        if name == "WeightStandardization":
            text = kept[0].get("repr") if kept and isinstance(kept[0], dict) else None
            found.append(_formula_in(text) if isinstance(text, str) else None)
    return found


def _formula_in(text: str) -> str | Formula | None:
    """The argument ``formula`` of a call."""
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    for argument in call.keywords if isinstance(call, ast.Call) else ():
        if argument.arg == "formula":
            return _value_of(argument.value)
    return None


def _value_of(node: ast.expr) -> str | Formula:
    try:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Formula" and not node.args:
            return Formula(**{str(part.arg): ast.literal_eval(part.value) for part in node.keywords})
        return str(ast.literal_eval(node))
    except (TypeError, ValueError):
        return ast.unparse(node)
