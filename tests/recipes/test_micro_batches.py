"""One step of 32 images in micro-batches of any size: the same gradients with GroupNorm, others with BatchNorm."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger
from torch import Tensor

from ws_algorithm import WeightStandardization
from ws_algorithm.recipes import registry

BATCH = 32
SIZES = [1, 8, 32]  # 32 micro-batches of one image, 4 of 8, and 1 of 32

# Each family of networks, narrow and shallow, as the recipes build it
NETS: dict[str, dict[str, Any]] = {
    "cifar_resnet": {"depth": 8, "width": 8},
    "cifar_preresnet": {"depth": 8},
    "cifar_densenet": {"depth": 10, "growth_rate": 12},
}


class GradientsBeforeTheStep(Callback):
    """Keeps the gradients as the optimizer is about to see them."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def after_train_batch(self, state: State, logger: Logger) -> None:
        named = state.model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def gradients_of_a_step(name: str, norm: str, microbatch_size: int, once_per_step: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = registry.MODELS[name](num_classes=10, norm=norm, **NETS[name]).double()
    batch = torch.randn(BATCH, 3, 32, 32, dtype=torch.float64), torch.arange(BATCH) % 10
    kept = GradientsBeforeTheStep()
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=BATCH),
        max_duration="1ba",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        device_train_microbatch_size=microbatch_size,
        algorithms=[WeightStandardization(once_per_step=once_per_step)],
        callbacks=[kept],
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return kept.gradients


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> Iterator[float]:
    """Of each parameter: the largest difference, relative to its largest gradient."""
    assert first.keys() == second.keys()
    for name in first:
        yield float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("once_per_step", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_micro_batches_change_nothing_with_group_norm(name: str, once_per_step: bool):
    whole = gradients_of_a_step(name, "group", BATCH, once_per_step)

    assert whole
    for size in SIZES[:-1]:
        assert max(differences(whole, gradients_of_a_step(name, "group", size, once_per_step))) < 1e-9


@pytest.mark.parametrize("name", NETS)
def test_micro_batches_change_the_gradients_with_batch_norm(name: str):
    whole, quarters = (gradients_of_a_step(name, "batch", size) for size in (BATCH, 8))

    assert max(differences(whole, quarters)) > 0.1
