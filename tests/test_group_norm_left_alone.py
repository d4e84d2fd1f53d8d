"""Batch norms that no GroupNorm can stand in for are left alone, and the log names them."""

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.ao.nn.intrinsic import ConvBn2d
from torch.ao.nn.intrinsic.qat import ConvBn2d as QATConvBn2d
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import apply_group_normalization


def norms(model: nn.Module) -> list[str]:
    """The names of the GroupNorms."""
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.GroupNorm)]


class Doubled(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class DoubledFrozen(FrozenBatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def patched(cls: Any = nn.BatchNorm2d) -> nn.Module:
    layer = cls(8)
    layer.forward = lambda x: x
    return layer


def qat() -> nn.Module:
    return QATConvBn2d(8, 8, 1, qconfig=get_default_qat_qconfig("fbgemm"))


def fused() -> nn.Module:
    return ConvBn2d(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))


def compiled() -> Any:
    return torch.compile(nn.BatchNorm2d(8), backend="eager")


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm": (lambda: BatchNormAct2d(8), r"0 \(BatchNormAct2d has a forward of its own\)"),
    "timm, frozen": (lambda: FrozenBatchNormAct2d(8), r"0 \(FrozenBatchNormAct2d has a forward of its own\)"),
    "subclass": (lambda: Doubled(8), r"0 \(Doubled has a forward of its own\)"),
    "subclass, frozen": (lambda: DoubledFrozen(8), r"0 \(DoubledFrozen has a forward of its own\)"),
    "patched": (patched, r"0 \(BatchNorm2d has a forward of its own\)"),
    "patched, frozen": (lambda: patched(FrozenBatchNorm2d), r"0 \(FrozenBatchNorm2d has a forward of its own\)"),
    "quantization-aware": (qat, r"0\.bn \(it is part of ConvBn2d, a fused or quantized layer"),
    "fused": (fused, r"0\.1 \(it is part of ConvBn2d, a fused or quantized layer"),
    "script": (lambda: torch.jit.script(nn.BatchNorm2d(8)), r"0 \(it is TorchScript\)"),
    "compiled": (compiled, r"0\._orig_mod \(it is compiled by itself\)"),
    "pruned": (lambda: prune.l1_unstructured(nn.BatchNorm2d(8), "weight", 0.5), r"0 \(its weight or bias is computed"),
    "parametrized": (
        lambda: parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", nn.Softplus()),
        r"0 \(it is parametrized\)",
    ),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_batch_norms_that_no_group_norm_can_stand_in_for_are_left_alone_and_named(kind, caplog):
    build, reason = LEFT_ALONE[kind]
    model = nn.Sequential(build(), nn.BatchNorm2d(8))
    layer, parts = model[0], list(model[0].modules())
    x = torch.randn(4, 8, 3, 3)
    expected = model[0].eval()(x)
    caplog.set_level(logging.INFO, logger="ws_algorithm")

    assert apply_group_normalization(model, 4) == 1

    assert model[0] is layer and list(layer.modules()) == parts and norms(model) == ["1"]
    assert torch.equal(layer(x), expected)
    (record,) = [record for record in caplog.records if record.name.startswith("ws_algorithm")]
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "Group Normalization: 1 of 2 batch norms of Sequential replaced; left alone: "
    )
    assert re.search(reason, record.getMessage())


def test_a_subclass_without_a_forward_of_its_own_is_replaced():
    class Renamed(nn.BatchNorm2d):
        """For a checkpoint that knows it by another name."""

    class RenamedFrozen(FrozenBatchNorm2d):
        """The same."""

    model = nn.Sequential(Renamed(8), RenamedFrozen(8))

    assert apply_group_normalization(model, 4) == 2
    assert norms(model) == ["0", "1"]


def test_a_compiled_model_computes_with_the_group_norms():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plain = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 6, 6)
    compiled(x)

    assert apply_group_normalization(compiled, 4) == apply_group_normalization(plain, 4) == 1

    assert torch.equal(compiled(x), plain(x))
    torch._dynamo.reset()
