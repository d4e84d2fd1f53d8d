import math
from typing import Any

import pytest
import torch
from torch import nn

from ws_algorithm.recipes import artifacts
from ws_algorithm.recipes.artifacts import FORMATS, check_installed, largest_difference, loaded_into_a_copy


@pytest.mark.parametrize(
    ("outputs", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),  # 0.5 of 2
        ([0.0, 0.5], [0.0, 0.0], 0.5),
        ([1.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_to_the_largest_value(outputs, expected, difference):
    assert largest_difference([torch.tensor(outputs)], [torch.tensor(expected)]) == difference


def test_differences_of_nested_outputs():
    first = [{"boxes": torch.zeros(1, 4), "scores": torch.tensor([0.5])}]
    second = [{"boxes": torch.zeros(1, 4), "scores": torch.tensor([0.25])}]

    assert largest_difference(first, second) == 1.0
    assert largest_difference(first, [*second, *second]) == math.inf


@pytest.mark.parametrize("position", [0, 1])
def test_what_is_no_number_is_no_small_difference(position):
    outputs = [torch.ones(1), torch.ones(1)]
    outputs[position] = torch.tensor([math.nan])

    assert math.isnan(largest_difference(outputs, [torch.ones(1), torch.ones(1)]))


def test_a_copy_has_nothing_but_what_the_state_dict_gives_it():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    state = {key: torch.full_like(value, 3) for key, value in network.state_dict().items()}

    read = loaded_into_a_copy(network, state)

    assert all(bool((value == 3).all()) for value in read.state_dict().values())
    assert not bool((network.state_dict()["0.weight"] == 3).all())
    with pytest.raises(RuntimeError, match="Missing key.*1.running_mean"):
        loaded_into_a_copy(network, {key: value for key, value in state.items() if key != "1.running_mean"})


@pytest.mark.parametrize("name", ["state_dict", "safetensors"])
def test_tied_weights_and_views_are_written(name, tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"first": weight, "again": weight, "turned": weight.T}
    path = tmp_path / "file"

    path.write_bytes(FORMATS[name].write(state))  # pyright: ignore
    read: Any = FORMATS[name].read(path)

    assert list(read) == list(state) or name == "safetensors"  # which sorts by size
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize(("name", "extra"), [("onnx", "onnx"), ("safetensors", "safetensors")])
def test_a_package_that_is_missing_is_named_with_its_extra(name, extra, monkeypatch):
    def missing(package: str) -> None:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(artifacts.importlib, "import_module", missing)

    with pytest.raises(ValueError, match=rf'needs {name}.*pip install "ws-algorithm\[{extra}\]"'):
        check_installed(name)
    check_installed("state_dict")
