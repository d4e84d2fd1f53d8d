"""The names of a model's parameters as a recipe's patterns see them."""

from __future__ import annotations

import re

from torch import nn

_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original\d*$")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter with the name that it has in the network as it was built.

    The ``module.`` with which a ``ComposerModel`` begins is left out, and a parametrized tensor has the name that it
    had before: ``conv.parametrizations.weight.original`` is ``conv.weight``.

    Example:
        >>> conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        >>> [name for name, _ in named_parameters(conv)]
        ['bias', 'weight', 'weight']
    """
    return [
        (_PARAMETRIZED.sub(r"\1", name.removeprefix("module.")), parameter)
        for name, parameter in model.named_parameters()
    ]
