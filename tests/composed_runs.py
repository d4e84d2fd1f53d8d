"""Short runs of a ``Trainer`` with other algorithms, on networks that give those something to do."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import Trainer
from composer.core import Algorithm
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet

from ws_algorithm import is_weight_standardized, standardize_weight
from ws_algorithm.parametrization import raw_weight

SEED = 3
IMAGE_SIZE = 32
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


def bottlenecks(norm: Callable[[int], nn.Module] = group_norm, blocks: Sequence[int] = (1, 1, 1, 1)) -> Any:
    """torchvision's ResNet of bottlenecks, thin; the same weights at every call."""
    torch.manual_seed(SEED)
    network = ResNet(Bottleneck, list(blocks), num_classes=2, width_per_group=8, norm_layer=norm)
    return ComposerClassifier(network, num_classes=2)


def two_convolutions() -> Any:
    """Convolutions ``module.0`` and ``module.3``; the same weights at every call."""
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return ComposerClassifier(network, num_classes=2)


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(SEED)
    return TensorDataset(torch.randn(8, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator), torch.arange(8) % 2)


def prepare(model: Any, algorithms: Sequence[Algorithm], batch_size: int = 4, **arguments: Any) -> Trainer:
    """A ``Trainer`` of four steps, an epoch on 8 images, on the same batches at every call."""
    data = images()
    loader = DataLoader(data, batch_size=batch_size, sampler=dist.get_sampler(data, shuffle=False))
    if "optimizers" not in arguments:
        arguments["optimizers"] = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(
        model=model,
        train_dataloader=loader,
        algorithms=algorithms,
        **{"max_duration": "4ba", "device": "cpu", "seed": SEED, "progress_bar": False, **arguments},
    )


def fit(trainer: Trainer) -> Trainer:
    """Train, with the same random draws for every trainer."""
    torch.manual_seed(SEED)
    trainer.fit()
    return trainer


def run(model: Any, algorithms: Sequence[Algorithm], **arguments: Any) -> Trainer:
    return fit(prepare(model, algorithms, **arguments))


def predict(model: Any) -> Tensor:
    """The outputs in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(images().tensors)


def standardizable(model: nn.Module) -> dict[str, Any]:
    """All convolutions but those whose standardized weight would be 0."""
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, CONVOLUTIONS)}
    return {name: conv for name, conv in convolutions.items() if conv.weight[0].numel() > 1}


def standardized(model: nn.Module) -> set[str]:
    """The names of the standardized convolutions, each of which computes with its raw weight standardized once."""
    names = {name for name, conv in standardizable(model).items() if is_weight_standardized(conv)}
    for name in names:
        conv: Any = model.get_submodule(name)
        assert len(conv.parametrizations["weight"]) == 1
        assert torch.equal(conv.weight, standardize_weight(raw_weight(conv)))
    return names


def assert_same(actual: Any, expected: Any) -> None:
    """The same structure with equal tensors, to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected
