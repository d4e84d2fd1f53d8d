"""Norms of torchvision and timm, most of which derive from no norm of torch."""

import pytest
import torchvision
from timm.layers.evo_norm import EvoNorm2dS0
from timm.layers.filter_response_norm import FilterResponseNormTlu2d
from timm.layers.norm import LayerNorm2d, RmsNorm2d
from timm.layers.norm_act import GroupNormAct
from torch import nn

from ws_algorithm import inspect_convolutions

NORMS = [
    torchvision.ops.FrozenBatchNorm2d(2),
    torchvision.models.convnext.LayerNorm2d(2),
    GroupNormAct(2, num_groups=1),
    LayerNorm2d(2),
    RmsNorm2d(2),
    EvoNorm2dS0(2, groups=1),
    FilterResponseNormTlu2d(2),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_it_is_a_norm(norm):
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), norm), layers="normalized")

    assert record.normalized_by == f"1 ({type(norm).__name__})" and record.standardized
