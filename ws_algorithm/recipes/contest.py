"""What is measured: a case, the model that it names, and one step of a contestant in it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints
from typing import Literal as L

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from ws_algorithm.recipes.rivals import RIVALS

SEED = 0

# Detectors by name, as a family and the ResNet in it
DETECTORS = {
    f"{family}_{short}": (family, arch)
    for family in ("faster_rcnn", "mask_rcnn")
    for short, arch in {
        "r50": "resnet50",
        "r101": "resnet101",
        "x50_32x4d": "resnext50_32x4d",
        "x101_32x4d": "resnext101_32x4d",
    }.items()
}
_NEEDED_BY_DETECTORS = ("composer", "pycocotools")

Targets = list[dict[str, Tensor]]

_SCALE = 256.0  # of the loss in float16: small enough that no step is skipped because of infinite gradients

_AMP_DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A model and the way that it is run.

    Args:
        model: A residual network of torchvision, by name; or a detector with one, such as ``"mask_rcnn_r50"``, of
            which only the convolutions that a norm follows are standardized, as published.
        norm: ``"group"`` for 32 groups, or ``"batch"``.
        image_size: Height and width in pixels.
        micro_batch_size: Images per forward; in ``"eval"`` the images of the one batch.
        micro_batches: Forwards and backwards per optimizer step; in ``"eval"`` 1.
        precision: ``"fp32"``, or a data type for autocast: ``"amp_bf16"``, ``"amp_fp16"``.
        mode: ``"train"`` for optimizer steps, ``"eval"`` for forwards without gradients.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of one operation.
        channels_last: Whether images and weights have the memory format ``channels_last``.
        regions: For detectors: regions of an image that are trained, a quarter of them with objects. In ``"eval"`` as
            many detections, at most 100.

    Raises:
        ValueError: If an argument is not of the kind described, or what it needs is not there.
    """

    model: str = "resnet50"
    norm: L["group", "batch"] = "group"
    image_size: int = 64
    micro_batch_size: int = 1
    micro_batches: int = 8
    precision: L["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    mode: L["train", "eval"] = "train"
    device: L["cpu", "cuda"] = "cpu"
    threads: int = 1
    channels_last: bool = False
    regions: int = 512

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        check_choices("model", [self.model], [*model_names(), *DETECTORS])
        for name in ("norm", "precision", "mode", "device"):
            check_choices(name, [getattr(self, name)], get_args(hints[name]))
        for name in ("image_size", "micro_batch_size", "micro_batches", "threads", "regions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` (={value!r}) must be a whole number from 1 on.")
        if self.mode == "eval" and self.micro_batches != 1:
            raise ValueError(f"`micro_batches` (={self.micro_batches}) must be 1 in mode 'eval', which runs one batch.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` (='cuda') is not there: torch.cuda.is_available() is false. Use 'cpu'.")
        missing = [name for name in _NEEDED_BY_DETECTORS if self.is_detector and not find_spec(name)]
        if missing:
            raise ValueError(
                f'`model` (={self.model!r}) needs {" and ".join(missing)}: pip install "ws-algorithm[detection]".'
            )

    @property
    def is_detector(self) -> bool:
        return self.model in DETECTORS

    @property
    def title(self) -> str:
        """All of the case in one line."""
        batch = (
            f"{self.micro_batches} x {self.micro_batch_size}" if self.mode == "train" else str(self.micro_batch_size)
        )
        layout = ", channels_last" if self.channels_last else ""
        layout += f", {self.regions} regions" if self.is_detector else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{self.mode} {self.model} ({self.norm} norm), {self.image_size} px, {batch} image(s), "
            f"{self.precision}{layout}, {self.device}, {threads}"
        )


def check_choices(argument: str, values: list[str], choices: Any) -> None:
    """Raise ``ValueError``, which names all choices, for the first value that is none of them."""
    for value in values:
        if value not in choices:
            raise ValueError(f"`{argument}` (={value!r}) must be one of {', '.join(choices)}.")


def model_names() -> list[str]:
    """The residual networks of torchvision."""
    from torchvision import models

    builders = {name: models.get_model_builder(name) for name in models.list_models()}
    return [name for name, builder in builders.items() if builder.__module__ == "torchvision.models.resnet"]


def build_model(case: Case) -> nn.Module:
    """The plain model of a case, with the same random weights in every call, on its device and in its mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any = _detector(case) if case.is_detector else _classifier(case)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return model.to(case.device, memory_format=layout).train(case.mode == "train")


def _classifier(case: Case) -> nn.Module:
    from torchvision import models

    norm: Any = nn.BatchNorm2d if case.norm == "batch" else lambda channels: nn.GroupNorm(32, channels)
    return models.get_model_builder(case.model)(weights=None, norm_layer=norm)


def _detector(case: Case) -> nn.Module:
    """A detector that has the same work whatever its weights are: so many regions, so many detections."""
    from ws_algorithm.recipes.models import rcnn

    family, arch = DETECTORS[case.model]
    build: Any = rcnn.build_mask_rcnn if family == "mask_rcnn" else rcnn.build_faster_rcnn
    detector = build(
        arch,
        norm=case.norm,
        min_size=case.image_size,
        max_size=case.image_size,
        rpn_post_nms_top_n_train=min(2000, 4 * case.regions),
        rpn_post_nms_top_n_test=min(1000, 4 * case.regions),
        box_batch_size_per_image=case.regions,
        box_score_thresh=0.0,
        box_detections_per_img=min(100, case.regions),
    )
    return detector.module


class Contestant:
    """A model, standardized in one way, that takes steps.

    Args:
        name: A key of ``RIVALS``.
        case: What to run it on.
    """

    def __init__(self, name: str, case: Case) -> None:
        self.case = case
        self.model = build_model(case)
        RIVALS[name].convert(self.model, "normalized" if case.is_detector else "all")
        self._around = RIVALS[name].around
        # A detector that learned would propose other regions: its weights are stepped, by nothing
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0 if case.is_detector else 0.01, momentum=0.9)
        self._scaler = GradScaler(case.device, init_scale=_SCALE, enabled=case.precision == "amp_fp16")
        self.micro_batches = list(_micro_batches(case))

    def around(self) -> AbstractContextManager[object]:
        """The context for the micro-batches of one optimizer step, or for the batches of an evaluation."""
        return self._around(self.model)

    def train(self) -> None:
        """One optimizer step over all micro-batches."""
        self.zero_grad()
        with self.around():
            for images, targets in self.micro_batches:
                self.backward(self.loss(images, targets))
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def evaluate(self) -> None:
        """One forward without gradients."""
        with torch.no_grad():
            self.forward(self.micro_batches[0][0])

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        """Outputs; of a detector detections, or losses where it is given `targets`."""
        dtype = _AMP_DTYPES.get(self.case.precision, torch.bfloat16)
        with torch.autocast(self.case.device, dtype=dtype, enabled=self.case.precision in _AMP_DTYPES):
            return self.model(list(images), targets) if self.case.is_detector else self.model(images)

    def loss(self, images: Tensor, targets: Any) -> Tensor:
        """The part of one micro-batch in the mean loss of the step."""
        if self.case.is_detector:
            return torch.stack(list(self.forward(images, targets).values())).sum() / self.case.micro_batches
        return F.cross_entropy(self.forward(images).float(), targets) / self.case.micro_batches

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()


def _micro_batches(case: Case) -> list[tuple[Tensor, Any]]:
    """Random images and targets, the same in every call, each micro-batch in memory of its own."""
    generator = torch.Generator().manual_seed(SEED + 1)
    shape = (case.micro_batch_size, 3, case.image_size, case.image_size)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    pairs = []
    for _ in range(case.micro_batches):
        images = torch.randn(shape, generator=generator).to(case.device, memory_format=layout)
        targets: Any = torch.randint(0, 1000, (case.micro_batch_size,), generator=generator).to(case.device)
        if case.is_detector:
            targets = [_objects(case, generator) for _ in images]
        pairs.append((images, targets))
    return pairs


def _objects(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Random boxes with full masks for a quarter of the regions, which objects are: the heads have that many then."""
    count = -(-case.regions // 4)
    longest = case.image_size // 4
    sides = torch.randint(longest // 4, longest, (count, 2), generator=generator).clamp(min=2)
    starts = (torch.rand(count, 2, generator=generator) * (case.image_size - sides)).long()
    boxes = torch.cat([starts, starts + sides], dim=1)
    masks = torch.zeros(count, case.image_size, case.image_size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(1, 81, (count,), generator=generator)
    found = {"boxes": boxes.float(), "labels": labels, "masks": masks}
    return {name: value.to(case.device) for name, value in found.items()}
