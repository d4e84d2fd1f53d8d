"""LAMB of You et al., 2020, which torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
LARGEST_RATIO = 10.0


class Lamb(torch.optim.Optimizer):
    """The direction of Adam plus decay of weights, as long as `lr` times the norm of the weight, within limits."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        update = self._update(parameter, parameter.grad, group)
                        parameter.sub_(group["lr"] * trust_ratio(parameter, update) * update)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        moments = []
        for name, value, beta in zip(("mean", "square"), (gradient, gradient.square()), group["betas"], strict=True):
            state[name].lerp_(value, 1 - beta)
            moments.append(state[name] / (1 - beta ** state["step"]))
        mean, square = moments
        return mean / (square.sqrt() + EPS) + group["weight_decay"] * parameter


def trust_ratio(weight: Tensor, update: Tensor) -> Tensor:
    """The norm of `weight` over that of `update`, 10 at most; 1 where either norm is 0."""
    of_weight, of_update = weight.norm(), update.norm()
    ratio = (of_weight / of_update).clamp(0.0, LARGEST_RATIO)
    return torch.where((of_weight > 0) & (of_update > 0), ratio, torch.ones_like(ratio))
