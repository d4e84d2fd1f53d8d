"""The loss before the first step: without Weight Standardization, of all convolutions, and of those before a norm.

    python benchmarks/initial_loss.py [PNG]

Models of torchvision with random weights in training mode, 64 px random images (detection: 128 px and random boxes) and
random labels; the same weights, images and dropout in each of the three. Prints a Markdown table, medians over three
seeds with the range in brackets, and draws the ratios to the loss without standardization.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn

from ws_algorithm import apply_weight_standardization

CLASSES = 21
SEEDS = (0, 1, 2)
RULES: tuple[Any, ...] = (None, "all", "normalized")
Loss = Callable[[nn.Module], Tensor]


def classification(name: str) -> tuple[nn.Module, Loss]:
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4,))
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    return model, lambda model: F.cross_entropy(model(images), labels)


def segmentation(name: str) -> tuple[nn.Module, Loss]:
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4, 64, 64))
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    return model, lambda model: F.cross_entropy(model(images)["out"], labels)


def detection(name: str) -> tuple[nn.Module, Loss]:
    images, corners = list(torch.rand(2, 3, 128, 128)), torch.rand(2, 3, 2) * 64
    boxes = torch.cat([corners, corners + 16 + torch.rand(2, 3, 2) * 40], dim=-1)
    targets = [{"boxes": boxes[i], "labels": torch.randint(1, CLASSES, (3,))} for i in range(2)]
    model = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=CLASSES, min_size=128, max_size=160
    )
    return model, lambda model: sum(model(images, targets).values(), torch.zeros(()))


MODELS: dict[str, Callable[[str], tuple[nn.Module, Loss]]] = {
    "resnet50": classification,
    "densenet121": classification,
    "mobilenet_v2": classification,
    "convnext_tiny": classification,
    "efficientnet_b0": classification,
    "mobilenet_v3_large": classification,
    "regnet_y_400mf": classification,
    "squeezenet1_1": classification,
    "vgg11": classification,
    "fcn_resnet50": segmentation,
    "deeplabv3_resnet50": segmentation,
    "lraspp_mobilenet_v3_large": segmentation,
    "fasterrcnn_resnet50_fpn_v2": detection,
    "retinanet_resnet50_fpn": detection,
}


def initial_loss(name: str, layers: Any, seed: int) -> float:
    torch.manual_seed(seed)
    model, loss = MODELS[name](name)
    if layers is not None:
        apply_weight_standardization(model, layers=layers)
    torch.manual_seed(seed + 1000)
    with torch.no_grad():
        return float(loss(model.train()))


def draw(losses: dict[str, dict[Any, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for layers, color, marker in (("all", "C3", "x"), ("normalized", "C0", "o")):
        for row, by_rule in enumerate(reversed(losses.values())):
            ratios = [with_ws / without for with_ws, without in zip(by_rule[layers], by_rule[None], strict=True)]
            axes.plot(ratios, [row] * len(ratios), marker, color=color, label=f"layers={layers!r}" if not row else None)
    axes.axvspan(0.5, 2, color="0.9", zorder=0)
    axes.set_yticks(range(len(losses)), list(reversed(losses)))
    axes.set(xscale="log", xlabel="initial loss with Weight Standardization / without (grey: within a factor of 2)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main() -> None:
    logging.disable(logging.WARNING)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{versions}, CPU, {torch.get_num_threads()} thread(s), seeds {SEEDS}", file=sys.stderr)
    print("| model | without | all | normalized |\n|---|---|---|---|")
    losses = {}
    for name in MODELS:
        losses[name] = {layers: [initial_loss(name, layers, seed) for seed in SEEDS] for layers in RULES}
        cells = [f"{statistics.median(v):.3g} ({min(v):.3g}-{max(v):.3g})" for v in losses[name].values()]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    if len(sys.argv) > 1:
        draw(losses, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
