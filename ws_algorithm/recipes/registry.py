"""Names in YAML to builders and classes: plain dicts."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from composer import algorithms, callbacks, loggers, optim
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from torch import optim as torch_optim

from ws_algorithm.algorithm import GroupNormalization, WeightStandardization
from ws_algorithm.recipes.data.cifar import build_cifar10_dataspec, build_cifar100_dataspec
from ws_algorithm.recipes.data.coco import build_coco_dataspec
from ws_algorithm.recipes.data.digits import build_digits_dataspec
from ws_algorithm.recipes.data.fashion_mnist import build_fashion_mnist_dataspec
from ws_algorithm.recipes.data.image_folder import build_image_folder_dataspec, build_imagenet_dataspec
from ws_algorithm.recipes.data.streaming_images import build_streaming_images_dataspec
from ws_algorithm.recipes.data.synthetic_images import build_synthetic_images_dataspec
from ws_algorithm.recipes.early_stopper import EarlyStopper
from ws_algorithm.recipes.linear_warmup_multi_step import LinearWarmupMultiStepScheduler
from ws_algorithm.recipes.models.cifar_alexnet import build_cifar_alexnet
from ws_algorithm.recipes.models.cifar_densenet import build_cifar_densenet
from ws_algorithm.recipes.models.cifar_preresnet import build_cifar_preresnet
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet
from ws_algorithm.recipes.models.cifar_resnext import build_cifar_resnext
from ws_algorithm.recipes.models.cifar_vgg import build_cifar_vgg
from ws_algorithm.recipes.models.cifar_wide_resnet import build_cifar_wide_resnet
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet
from ws_algorithm.recipes.models.rcnn import build_faster_rcnn, build_mask_rcnn

Registry = dict[str, Callable[..., Any]]


def _classes(modules: tuple[ModuleType, ...], base: type) -> Registry:
    """The concrete public classes of modules that derive from `base`, by name."""
    return {
        name: member
        for module in modules
        for name, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base) and member is not base and not inspect.isabstract(member)
    }


MODELS: Registry = {
    "cifar_alexnet": build_cifar_alexnet,
    "cifar_densenet": build_cifar_densenet,
    "cifar_preresnet": build_cifar_preresnet,
    "cifar_resnet": build_cifar_resnet,
    "cifar_resnext": build_cifar_resnext,
    "cifar_vgg": build_cifar_vgg,
    "cifar_wide_resnet": build_cifar_wide_resnet,
    "faster_rcnn": build_faster_rcnn,
    "imagenet_resnet": build_imagenet_resnet,
    "mask_rcnn": build_mask_rcnn,
}
DATA: Registry = {
    "cifar10": build_cifar10_dataspec,
    "cifar100": build_cifar100_dataspec,
    "coco": build_coco_dataspec,
    "digits": build_digits_dataspec,
    "fashion_mnist": build_fashion_mnist_dataspec,
    "image_folder": build_image_folder_dataspec,
    "imagenet": build_imagenet_dataspec,
    "streaming_images": build_streaming_images_dataspec,
    "synthetic_images": build_synthetic_images_dataspec,
}
# LBFGS evaluates the loss again within a step, SparseAdam takes sparse gradients: the Trainer has neither
OPTIMIZERS: Registry = {
    name: optimizer
    for name, optimizer in _classes((torch_optim, optim), torch_optim.Optimizer).items()
    if name not in ("LBFGS", "SparseAdam")
}
SCHEDULERS: Registry = _classes((optim,), ComposerScheduler) | {
    "LinearWarmupMultiStepScheduler": LinearWarmupMultiStepScheduler
}
ALGORITHMS: Registry = _classes((algorithms,), Algorithm) | {
    "GroupNormalization": GroupNormalization,
    "WeightStandardization": WeightStandardization,
}
# Algorithms that replace or rename layers of the model that a recipe builds
SURGERY = frozenset(
    {"BlurPool", "Factorize", "GhostBatchNorm", "GroupNormalization", "SqueezeExcite", "StochasticDepth"}
)
CALLBACKS: Registry = _classes((callbacks,), Callback) | {"EarlyStopper": EarlyStopper}
LOGGERS: Registry = _classes((loggers,), LoggerDestination)

# Loggers that write files: which argument says where, and where it is in a run folder
LOGGER_FILES = {
    "FileLogger": ("filename", "logs-rank{rank}.txt"),
    "TensorboardLogger": ("log_dir", "tensorboard"),
}

# The module that a logger needs, and what installs it
_NEEDS = {
    "TensorboardLogger": ("tensorboard", "ws-algorithm[tensorboard]"),
    "WandBLogger": ("wandb", "ws-algorithm[wandb]"),
    "MLFlowLogger": ("mlflow", "ws-algorithm[mlflow]"),
    "CometMLLogger": ("comet_ml", "mosaicml[comet_ml]"),
    "NeptuneLogger": ("neptune", "mosaicml[neptune]"),
    "SlackLogger": ("slack_sdk", "mosaicml[slack]"),
}


def missing_extra(name: str) -> str | None:
    """What to install before the logger `name` can be used, or ``None`` if it can."""
    module, requirement = _NEEDS.get(name, (None, None))
    if module is None or _is_installed(module):
        return None
    return f'{name} needs {module}: pip install "{requirement}"'


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was made unimportable
        return False
