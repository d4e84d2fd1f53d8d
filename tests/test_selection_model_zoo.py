"""Every model of torchvision, and many of timm: the selection against a run that follows the tensors.

The quantized models of torchvision are left out: they are copies of seven classification models with observers.
"""

import gc
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from tensor_following import CONVOLUTIONS, Followed, follow
from torch import nn
from torchvision.models import regnet

from ws_algorithm import (
    apply_weight_standardization,
    inspect_convolutions,
    is_weight_standardized,
    remove_weight_standardization,
)

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
VIDEO = torchvision.models.list_models(module=torchvision.models.video)
OPTICAL_FLOW = torchvision.models.list_models(module=torchvision.models.optical_flow)
DETECTION = torchvision.models.list_models(module=torchvision.models.detection)


def _documented_counts() -> dict[str, list[int]]:
    """Of the table in the documentation: all convolutions, and those standardized by either value of ``layers``."""
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+):(\S+)` \| (\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
    return {f"{library}/{name}": [int(count) for count in counts] for library, name, *counts in rows}


DOCUMENTED = _documented_counts()
TIMM = [name.removeprefix("timm/") for name in DOCUMENTED if name.startswith("timm/")]

# By default these two warn about the initialization that they would choose
ARGUMENTS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
# Layers whose forward standardizes its weight already
OWN_STANDARDIZATION = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}


def _build_torchvision(name: str) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    arguments: dict[str, Any] = dict(ARGUMENTS.get(name, {}))
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
    if name in DETECTION and not name.startswith("ssd"):
        arguments |= {"min_size": 128, "max_size": 160}
    if "rcnn" in name:
        arguments |= {"rpn_post_nms_top_n_test": 10}
    return builder(weights=None, **arguments)


def build(name: str) -> nn.Module:
    """On the meta device, but for detection models, whose forward depends on values."""
    library, name = name.split("/")
    block_widths = regnet.BlockParams.from_init_params

    def block_widths_on_cpu(*args: Any, **kwargs: Any) -> Any:  # numbers computed with tensors
        with torch.device("cpu"):
            return block_widths(*args, **kwargs)

    device = torch.device("cpu" if name in DETECTION else "meta")
    with mock.patch.object(regnet.BlockParams, "from_init_params", block_widths_on_cpu), device:
        return timm.create_model(name, pretrained=False) if library == "timm" else _build_torchvision(name)


def inputs_of(name: str, model: Any) -> list[Any]:
    library, name = name.split("/")
    if library == "timm":
        return [torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")]
    if name in DETECTION:
        return [[torch.rand(3, 128, 128)]]
    if name in OPTICAL_FLOW:
        return [torch.empty(1, 3, 128, 128, device="meta")] * 2
    if name in VIDEO:
        return [torch.empty(2, 3, 16, 224, 224, device="meta")]
    size = 299 if name == "inception_v3" else 224
    return [torch.empty(2, 3, size, size, device="meta")]


@dataclass(frozen=True)
class Case:
    """A model, what a run of it did, and what the selection says of it."""

    name: str
    model: nn.Module
    followed: Followed
    all: list[Any]
    normalized: list[Any]  # without an input
    exact: list[Any]  # the same if forward was traced, else with the input of the run
    warnings: dict[int, list[str]]  # of the standardization with layers="normalized", by n_last_layers_ignore


def _warnings_of_standardization(model: nn.Module, chosen: set[str], n: int) -> list[str]:
    """Of a standardization that is taken back; it has to do what was said, or else to leave out the last `n`."""
    logger, heard = logging.getLogger("ws_algorithm"), BufferingHandler(capacity=1000)
    before = {name for name, child in model.named_modules() if is_weight_standardized(child)}
    logger.addHandler(heard)
    try:
        count = apply_weight_standardization(model, n, layers="normalized")
    finally:
        logger.removeHandler(heard)
    convolutions = {name for name, child in model.named_modules() if isinstance(child, CONVOLUTIONS)}
    standardized = {name for name in convolutions - before if is_weight_standardized(model.get_submodule(name))}
    assert count == len(standardized)
    assert standardized == chosen if n == 0 else len(chosen) - n <= len(standardized) and standardized <= chosen
    if count:
        remove_weight_standardization(model)
    return [record.getMessage() for record in heard.buffer if record.levelno == logging.WARNING]


# In training these need targets
EVALUATED = [f"torchvision/{name}" for name in DETECTION]
TRAINED = [f"torchvision/{name}" for name in TORCHVISION + SEGMENTATION + VIDEO + OPTICAL_FLOW]
TRAINED += [f"timm/{name}" for name in TIMM]


@pytest.fixture(scope="module", params=TRAINED + EVALUATED)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    name = request.param
    torch.manual_seed(17)
    model = build(name).train(name in TRAINED)
    inputs = inputs_of(name, model)
    followed = follow(model, *inputs)
    everything = inspect_convolutions(model)
    normalized = exact = inspect_convolutions(model, layers="normalized")
    warnings = {}
    in_doubt = any("not known" in record.reason for record in normalized)
    if in_doubt or any(record.order != "traced" for record in normalized):
        exact = inspect_convolutions(model, layers="normalized", example_input=tuple(inputs))
        assert {record.order for record in exact} == {"observed"}
        warnings[1] = _warnings_of_standardization(model, chosen_in(normalized), 1)
    if followed.normalized != normalized_in(normalized):
        warnings[0] = _warnings_of_standardization(model, chosen_in(normalized), 0)
    assert model.training == (name in TRAINED)
    yield Case(name, model, followed, everything, normalized, exact, warnings)
    gc.collect()


def normalized_in(records: list[Any]) -> set[str]:
    return {record.name for record in records if record.normalized_by}


def chosen_in(records: list[Any]) -> set[str]:
    """Those that the package is to standardize, and that no class of its own standardizes already."""
    return {record.name for record in records if record.standardized and "already" not in record.reason}


def can_be_standardized(model: nn.Module) -> set[str]:
    return {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, CONVOLUTIONS)
        if type(layer).__name__ not in OWN_STANDARDIZATION and layer.weight[0].numel() > 1
    }


def test_each_convolution_is_recorded_once(case):
    convolutions = {name: m for name, m in case.model.named_modules() if isinstance(m, CONVOLUTIONS)}

    for records in (case.all, case.normalized, case.exact):
        assert sorted(record.name for record in records) == sorted(convolutions)
        for index, record in enumerate(records):
            weight = convolutions[record.name].weight
            assert record.index == index and record.reason
            assert record.weight_shape == tuple(weight.shape) and record.fan_in == weight[0].numel()
    assert chosen_in(case.all) == can_be_standardized(case.model)


def test_none_without_a_normalization_is_standardized(case):
    assert chosen_in(case.normalized) <= case.followed.normalized
    assert normalized_in(case.normalized) <= case.followed.normalized


def test_the_selection_is_what_the_run_did(case):
    assert [record.name for record in case.exact] == case.followed.order
    assert normalized_in(case.exact) == case.followed.normalized
    assert chosen_in(case.exact) == case.followed.normalized & can_be_standardized(case.model)


def test_the_normalization_that_is_named_is_one_that_the_run_reached(case):
    for record in case.normalized:
        if record.normalized_by:
            assert record.normalized_by.split(" (")[0] in case.followed.norms[record.name], record


def test_what_could_not_be_decided_is_warned_of(case):
    missed = case.followed.normalized - normalized_in(case.normalized)
    out_of_order = [record.name for record in case.normalized] != case.followed.order

    assert not missed or case.warnings[0]
    assert not out_of_order or case.warnings[1]


def test_the_documentation_has_the_counts(case):
    counts = [
        len(case.all),
        *(sum(record.standardized for record in records) for records in (case.all, case.normalized)),
    ]

    assert DOCUMENTED[case.name] == counts


# Auxiliary heads run in training only, and some layers do something else in evaluation
@pytest.mark.parametrize(
    "name",
    ["timm/repvgg_a0", "timm/tinynet_e"]
    + [f"torchvision/{name}" for name in ("convnext_tiny", "efficientnet_b0", "googlenet", "inception_v3", "s3d")],
)
def test_a_model_in_evaluation_mode_is_selected_from_as_in_training(name):
    model = build(name)
    followed = follow(model.train(), *inputs_of(name, model))
    records = inspect_convolutions(model.eval(), layers="normalized")

    assert [record.name for record in records] == followed.order
    assert normalized_in(records) == followed.normalized
    assert not _warnings_of_standardization(model, chosen_in(records), 0)


BY_HAND: dict[str, Callable[[str], bool]] = {  # which convolutions have no norm, read off the definitions
    "resnet18": lambda name: False,
    "vgg11": lambda name: True,
    "densenet121": lambda name: "transition" in name,  # pooled before the next norm
    "convnext_tiny": lambda name: name == "features.6.1",  # the others reach the norm of the next stage by additions
    "efficientnet_b0": lambda name: name.endswith(("fc1", "fc2")),
    "deeplabv3_resnet50": lambda name: name == "classifier.4",
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_run_of_a_model_by_hand(name):
    model = build(f"torchvision/{name}")
    followed = follow(model, *inputs_of(f"torchvision/{name}", model))

    assert set(followed.order) == followed.executed
    assert followed.executed - followed.normalized == set(filter(BY_HAND[name], followed.order))


def test_the_models_that_are_tested():
    quantized = set(torchvision.models.list_models(module=torchvision.models.quantization))
    tested = {name.split("/")[1] for name in TRAINED + EVALUATED if name.startswith("torchvision/")}

    assert tested == set(torchvision.models.list_models()) - quantized
    assert len(tested) == 109 and len(TIMM) == 50
