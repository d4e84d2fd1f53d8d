"""Short runs of a ``Trainer`` that accumulates gradients over micro-batches, beside other algorithms."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import EMA, SAM, SWA, GradientClipping
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from exact_twins import assert_near, gradients
from lamb import Lamb
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ws_algorithm import WeightStandardization

SEED = 11
TOLERANCE = 1e-9

Build = Callable[[], list[Algorithm]]


def classifier(dtype: torch.dtype = torch.float64) -> Any:
    """Convolutions ``module.0`` and ``module.3``; the same weights at every call."""
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    return ComposerClassifier(network.to(dtype), num_classes=2)


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(images.to(dtype), torch.arange(16) % 2)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def lamb(model: Any) -> torch.optim.Optimizer:
    return Lamb(model.parameters(), lr=0.01)


def prepare(algorithms: Sequence[Algorithm], model: Any = None, optimizer: Any = sgd, **arguments: Any) -> Trainer:
    """A ``Trainer`` of twenty steps, each of four micro-batches of two images, or as many on each rank."""
    model = classifier() if model is None else model
    dataset = data(next(model.parameters()).dtype)
    loader = DataLoader(dataset, batch_size=8, sampler=dist.get_sampler(dataset, shuffle=False))
    return Trainer(
        model=model,
        train_dataloader=loader,
        algorithms=algorithms,
        optimizers=optimizer(model),
        **{
            "max_duration": "20ba",
            "device_train_microbatch_size": 2,
            "device": "cpu",
            "seed": SEED,
            "progress_bar": False,
            **arguments,
        },
    )


def run(algorithms: Sequence[Algorithm], *arguments: Any, **others: Any) -> Trainer:
    trainer = prepare(algorithms, *arguments, **others)
    trainer.fit()
    return trainer


def exact() -> WeightStandardization:
    return WeightStandardization(once_per_step=False)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_ends_near(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """`assert_near`, with the tolerance of twenty steps in float64."""
    assert_near(actual, expected, tolerance)


def outcome(trainer: Trainer) -> dict[str, Tensor]:
    """The weights, and their average if an algorithm keeps one beside them."""
    result = weights(trainer.state.model)
    for algorithm in trainer.state.algorithms:
        if isinstance(algorithm, EMA):
            assert algorithm.ema_model is not None
            averages = algorithm.ema_model.named_parameters_dict
            result.update({f"average of {name}": value.clone() for name, value in averages.items()})
    return result


OTHERS: dict[str, tuple[Any, Build]] = {
    "SGD": (sgd, lambda: []),
    "Adam": (adam, lambda: []),
    "LAMB": (lamb, lambda: []),
    "LAMB, clip norm": (lamb, lambda: [GradientClipping("norm", 0.05)]),
    "clip norm": (sgd, lambda: [GradientClipping("norm", 0.05)]),
    "clip value": (sgd, lambda: [GradientClipping("value", 0.005)]),
    "clip adaptively": (sgd, lambda: [GradientClipping("adaptive", 0.01)]),
    "SAM": (sgd, lambda: [SAM(rho=0.1)]),
    "SAM at times": (sgd, lambda: [SAM(rho=0.1, interval=3)]),
    "SAM, clip norm": (sgd, lambda: [SAM(rho=0.1), GradientClipping("norm", 0.05)]),
    "EMA": (sgd, lambda: [EMA(half_life="3ba")]),
    "SWA": (sgd, lambda: [SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba")]),
}


@cache
def expected(name: str) -> dict[str, Tensor]:
    optimizer, others = OTHERS[name]
    return outcome(run([exact(), *others()], None, optimizer))


def by_hand(model: Any, forward: Callable[[Tensor], Tensor], zeroes: bool) -> dict[str, Tensor | None]:
    if zeroes:
        model.zero_grad()
    images = data().tensors[0]
    for batch in images.split(4):
        forward(batch).square().mean().backward()
    return gradients(model)


class WeightsUsed(Callback):
    """The weights that the first convolution convolved with, by batch. Kept, so that no two are at one address."""

    def __init__(self) -> None:
        self.by_batch: dict[int, list[Tensor]] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        def remember(conv: Any, *_: Any) -> None:
            self.by_batch.setdefault(int(state.timestamp.batch), []).append(conv.weight)

        network: Any = state.model.module
        self.handle = network[0].register_forward_hook(remember)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.handle.remove()
