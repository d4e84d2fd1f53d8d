"""Short runs, what they leave in their folder, and a Fashion-MNIST of a few images."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ws_algorithm

CHECKOUT = Path(ws_algorithm.__file__).parents[1]
YAMLS = sorted((CHECKOUT / "yamls").rglob("*.yaml"))

# Three steps of quickstart, a second on one core
FEW = ["max_duration=1ep", "train_subset_num_batches=3", "device_train_microbatch_size=4"]

# The same for what a shipped recipe is about, on 32 images
FEW_FASHION = [*FEW, "root=data", "global_train_batch_size=8", "global_eval_batch_size=16", "model.depth=8"]


def metric_rows(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics without the time that they took."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def load_state(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=False)["state"]  # Composer pickles more than tensors


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_state(checkpoint)["model"]


def is_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def write_fashion_mnist(root: Path, train: int = 32, test: int = 16) -> None:
    """Random images in the files that ``torchvision.datasets.FashionMNIST`` reads."""
    generator = np.random.default_rng(0)
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        _write_idx(folder / f"{part}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        _write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)  # 8: unsigned bytes
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def environment(**extra: str) -> dict[str, str]:
    """The environment of a subprocess that imports this checkout and its tests from wherever it runs."""
    paths = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **extra}
