"""What may be said of a forward that cannot be traced: the truth, or that it is not known."""

from typing import Any

from looked_at import is_sure, norms
from tensor_following import follow
from torch import nn


def is_found_or_missed_aloud(model: nn.Module, truth: dict[str, str | None], example_input: Any = None) -> bool:
    """Whether the convolutions in use and their norms are found, or a doubt is told and no norm is made up."""
    found = norms(model, example_input)
    invented = [name for name, norm in found.items() if norm is not None and norm != truth.get(name)]
    return found == truth or not (is_sure(model, example_input) or invented)


def truth_about(model: nn.Module, *inputs: Any) -> dict[str, str | None]:
    """The convolutions in use and the norm after each, in evaluation, as their tensors are followed in a real run."""
    followed = follow(model.eval(), *inputs)
    return {name: next(iter(followed.norms[name]), None) for name in followed.order if name in followed.executed}
