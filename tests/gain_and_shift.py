"""Gain and shift of a convolution, for :func:`standardize_weight`."""

from typing import Any


def gain_and_shift(conv: Any) -> dict[str, Any]:
    """Arguments for ``standardize_weight``: none for a formula that has neither."""
    chain = conv.parametrizations["weight"]
    if len(chain) == 1:
        return {}
    return {"gain": chain[1].gain} if chain[1].shift is None else {"gain": chain[1].gain, "shift": chain[1].shift}
