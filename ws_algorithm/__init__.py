"""Weight Standardization (Qiao et al. 2019, https://arxiv.org/abs/1903.10520) for PyTorch and Composer.

Importing this package imports nothing else: each name below is loaded when it is first used, so that the functions need
torch alone and only the algorithm needs Composer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ws_algorithm.algorithm import GroupNormalization as GroupNormalization
    from ws_algorithm.algorithm import WeightStandardization as WeightStandardization
    from ws_algorithm.checkpoints.conversion import ConvertedCheckpoint as ConvertedCheckpoint
    from ws_algorithm.checkpoints.conversion import convert_checkpoint as convert_checkpoint
    from ws_algorithm.checkpoints.reading import read_checkpoint as read_checkpoint
    from ws_algorithm.checkpoints.sources import ImageInput as ImageInput
    from ws_algorithm.folding import fold_weight_standardization as fold_weight_standardization
    from ws_algorithm.folding import folded_copy as folded_copy
    from ws_algorithm.folding import unfold_weight_standardization as unfold_weight_standardization
    from ws_algorithm.formula import FORMULAS as FORMULAS
    from ws_algorithm.formula import Formula as Formula
    from ws_algorithm.formula import standardize_weight as standardize_weight
    from ws_algorithm.functional import apply_weight_standardization as apply_weight_standardization
    from ws_algorithm.functional import is_weight_standardized as is_weight_standardized
    from ws_algorithm.functional import remove_weight_standardization as remove_weight_standardization
    from ws_algorithm.group_norm import apply_group_normalization as apply_group_normalization
    from ws_algorithm.inspection import ConvolutionRecord as ConvolutionRecord
    from ws_algorithm.inspection import inspect_convolutions as inspect_convolutions
    from ws_algorithm.once import release_standardized_weights as release_standardized_weights
    from ws_algorithm.once import standardize_once as standardize_once
    from ws_algorithm.parametrization import WeightStandardizer as WeightStandardizer
    from ws_algorithm.state_dicts import folded_state_dict as folded_state_dict
    from ws_algorithm.state_dicts import plain_state_dict as plain_state_dict

__version__ = "0.1.0"

_FILE_OF = {
    "GroupNormalization": "algorithm",
    "WeightStandardization": "algorithm",
    "ConvertedCheckpoint": "checkpoints.conversion",
    "convert_checkpoint": "checkpoints.conversion",
    "read_checkpoint": "checkpoints.reading",
    "ImageInput": "checkpoints.sources",
    "FORMULAS": "formula",
    "Formula": "formula",
    "standardize_weight": "formula",
    "fold_weight_standardization": "folding",
    "folded_copy": "folding",
    "unfold_weight_standardization": "folding",
    "apply_weight_standardization": "functional",
    "is_weight_standardized": "functional",
    "remove_weight_standardization": "functional",
    "apply_group_normalization": "group_norm",
    "ConvolutionRecord": "inspection",
    "inspect_convolutions": "inspection",
    "WeightStandardizer": "parametrization",
    "release_standardized_weights": "once",
    "standardize_once": "once",
    "folded_state_dict": "state_dicts",
    "plain_state_dict": "state_dicts",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FILE_OF})
