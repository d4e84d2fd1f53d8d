"""What this package and Composer's built-in Weight Standardization do in the same situations, side by side.

    python benchmarks/compare_with_composer.py

Each row is run, with Composer's function and with ours, on freshly built models. The last row is a time: standardizing
all 53 weights of a ResNet-50, forward and backward, alternating between the two, the median of 15 repeats each.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import composer
import torch
import torchvision
from composer.functional import apply_stochastic_depth
from composer.functional import apply_weight_standardization as composers
from torch import nn
from torch.nn.utils import parametrize

from ws_algorithm import apply_weight_standardization as ours

Apply = Callable[..., int]


class HeadDefinedFirst(nn.Module):
    """A fully convolutional network that executes its prediction head last but defines it beside its stem."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "head": nn.Conv2d(8, 2, 1)})
        self.body = nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ends["head"](self.body(self.ends["stem"](x)))


def raw_weight(conv: Any) -> torch.Tensor:
    return conv.parametrizations.weight.original


def standardized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module, "weight")]


def subclassed_convolutions(apply: Apply) -> str:
    model = torchvision.models.video.r3d_18()
    apply(model)
    return f"{len(standardized(model))} of {sum(isinstance(module, nn.Conv3d) for module in model.modules())}"


def stochastic_depth(apply: Apply) -> str:
    counts = []
    for seed in range(5):
        model = torchvision.models.resnet50()
        apply_stochastic_depth(model, target_layer_name="ResNetBottleneck", drop_rate=0.2)
        torch.manual_seed(seed)
        counts.append(apply(model))
    return f"{', '.join(map(str, sorted(set(counts))))} of 53"


def bad_start(apply: Apply) -> str:
    torch.manual_seed(0)
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    images, labels = torch.randn(2, 3, 96, 96), torch.randint(0, 21, (2, 96, 96))
    before = float(nn.functional.cross_entropy(model(images)["out"], labels))
    with Warnings() as heard:
        apply(model)
    after = float(nn.functional.cross_entropy(model(images)["out"], labels))
    return f"{before:.2f} to {after:.2f}, {'warns' if heard.names_a_layer else 'silent'}"


def by_the_papers_rule(apply: Apply) -> str:
    if apply is composers:
        return "no such rule"
    torch.manual_seed(0)
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    images, labels = torch.randn(2, 3, 96, 96), torch.randint(0, 21, (2, 96, 96))
    before = float(nn.functional.cross_entropy(model(images)["out"], labels))
    count = ours(model, layers="normalized")
    after = float(nn.functional.cross_entropy(model(images)["out"], labels))
    return f"{count} of 61; {before:.2f} to {after:.2f}"


class Warnings(logging.Handler):
    """Whether, meanwhile, a warning named the layer that nothing normalizes."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names_a_layer = False

    def emit(self, record: logging.LogRecord) -> None:
        self.names_a_layer |= "classifier.4" in record.getMessage()

    def __enter__(self) -> Warnings:
        logging.disable(logging.NOTSET)
        for logger in ("composer", "ws_algorithm"):
            logging.getLogger(logger).addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.disable()


def ignore_the_head(apply: Apply) -> str:
    model = HeadDefinedFirst()
    apply(model, n_last_layers_ignore=1)
    left = {"ends.stem", "ends.head", "body"} - set(standardized(model))
    return f"leaves out {', '.join(sorted(left))}"


def convolution_itself(apply: Apply) -> str:
    return f"{apply(nn.Conv2d(3, 8, 3))} standardized"


def applied_twice(apply: Apply) -> str:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    apply(model)
    apply(model)
    return f"standardized {len(model[0].parametrizations.weight)}x per forward"


def fan_in_one(apply: Apply) -> str:
    model: Any = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8))
    apply(model)
    return f"largest weight {model[0].weight.abs().max():.2f}"


def constant_filter_in_half(apply: Apply) -> str:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3)).half()
    nn.init.zeros_(model[0].weight)
    apply(model)
    return "finite" if bool(model[0].weight.isfinite().all()) else "NaN"


def plain_checkpoint(apply: Apply) -> str:
    model = torchvision.models.resnet18()
    checkpoint = model.state_dict()
    apply(model)
    try:
        model.load_state_dict(checkpoint)
    except RuntimeError:
        return "refused"
    return "loaded"


def reset_after(apply: Apply) -> str:
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    apply(model)
    before = raw_weight(model[0]).clone()
    model[0].reset_parameters()
    return "no effect" if torch.equal(before, raw_weight(model[0])) else "draws anew"


def negative_count(apply: Apply) -> str:
    try:
        return f"accepted, {apply(nn.Sequential(nn.Conv2d(3, 8, 3)), n_last_layers_ignore=-1)} standardized"
    except ValueError:
        return "ValueError"


def one_step(model: nn.Module) -> None:
    modules: Any = model.modules()
    for module in modules:
        if parametrize.is_parametrized(module, "weight"):
            module.weight.sum().backward()


def times() -> tuple[list[float], list[float]]:
    models = {apply: torchvision.models.resnet50() for apply in (composers, ours)}
    for apply, model in models.items():
        apply(model)
        one_step(model)
    seconds: dict[Apply, list[float]] = {apply: [] for apply in models}
    for _ in range(15):
        for apply, model in models.items():
            start = time.perf_counter()
            one_step(model)
            seconds[apply].append(time.perf_counter() - start)
    return seconds[composers], seconds[ours]


ROWS = {
    "torchvision r3d_18: Conv3d layers standardized": subclassed_convolutions,
    "StochasticDepth first, five seeds": stochastic_depth,
    "initial loss, deeplabv3_resnet50": bad_start,
    "the same by the paper's rule": by_the_papers_rule,
    "head defined before body, n_last_layers_ignore=1": ignore_the_head,
    "the model is a convolution": convolution_itself,
    "applied twice": applied_twice,
    "fan-in 1 (1x1 depthwise)": fan_in_one,
    "constant filter in float16": constant_filter_in_half,
    "plain torchvision checkpoint, strict": plain_checkpoint,
    "conv.reset_parameters() afterwards": reset_after,
    "n_last_layers_ignore=-1": negative_count,
}


def main() -> int:
    logging.disable()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    versions = f"Composer {composer.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{versions}; CPU, {torch.get_num_threads()} threads; seed 0")
    print(f"{'':52}{'Composer':30}{'ws_algorithm':30}")
    for title, row in ROWS.items():
        print(f"{title:52}{row(composers):30}{row(ours):30}")
    theirs, own = times()
    title = "all ResNet-50 weights, forward + backward"
    cells = [f"{statistics.median(s) * 1e3:.0f} ms ({min(s) * 1e3:.0f}-{max(s) * 1e3:.0f})" for s in (theirs, own)]
    print(f"{title:52}{cells[0]:30}{cells[1]:30}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
