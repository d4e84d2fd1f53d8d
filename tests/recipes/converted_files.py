"""Files of weights such as ``ws-algorithm convert`` writes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IMAGENET: dict[str, Any] = {
    "channels": "rgb",
    "scale": 1.0,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# Detectron's, whose mean of blue, green and red is 102.9801, 115.9465 and 122.7717
DETECTRON: dict[str, Any] = {
    "channels": "rgb",
    "scale": 255.0,
    "mean": [122.7717, 115.9465, 102.9801],
    "std": [1.0, 1.0, 1.0],
}


def write_converted(
    path: str,
    state_dict: Mapping[str, Tensor],
    formula: Any = "paper",
    image_input: Any = IMAGENET,
    *,
    options: Any = None,
    include: Any = None,
) -> None:
    entry = {"source": "weight_standardization", "model": "resnet50", "formula": formula}
    entry |= {"image_input": image_input, "options": options or {}, "include": include}
    torch.save({"state_dict": dict(state_dict), "ws_algorithm": entry}, path)
