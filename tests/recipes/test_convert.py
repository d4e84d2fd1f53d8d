"""The verb: a published file to one that recipes load, and a recipe for it."""

import os
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ws_algorithm.__main__ import main
from ws_algorithm.checkpoints.targets import MODELS, target_shapes
from ws_algorithm.recipes.convert import BUILDERS, convert
from ws_algorithm.recipes.registry import MODELS as REGISTRY


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path: str, model: str = "resnet50", prefix: str = "module.") -> dict[str, torch.Tensor]:
    """A file of the authors, each tensor one number of memory."""
    shapes = target_shapes(model, 1000)
    weights = {
        f"{prefix}{name}": torch.full((), float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())
    }
    torch.save(weights, path)
    return weights


def run(*arguments: str) -> int:
    return main(["convert", *arguments])


RESNET = ("--to", "torchvision", "--model", "resnet50")


def test_a_file_and_its_recipe_are_written_and_described(capsys):
    weights = save("R-50-GN-WS.pth.tar")

    assert run("R-50-GN-WS.pth.tar", "r50.pth", *RESNET) == 0

    content = torch.load("r50.pth", weights_only=True)
    assert content["ws_algorithm"] == {
        "source": "weight_standardization",
        "model": "resnet50",
        "formula": "paper",
        "image_input": {"channels": "rgb", "scale": 1.0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "options": {"num_classes": 1000, "norm": "group"},
        "include": None,
    }
    assert {f"module.{name}" for name in content["state_dict"]} == set(weights)
    assert all(torch.equal(tensor, weights[f"module.{name}"]) for name, tensor in content["state_dict"].items())
    assert yaml.safe_load(Path("r50.yaml").read_text()) == {
        "model": {
            "name": "imagenet_resnet",
            "arch": "resnet50",
            "num_classes": 1000,
            "norm": "group",
            "pretrained": str(Path("r50.pth").resolve()),
        },
        "algorithms": {"WeightStandardization": {"layers": "normalized", "formula": "paper"}},
    }
    printed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in printed] == ["source", "model", "formula", "images", "tensors", "weights", "recipe"]
    assert dict(printed)["tensors"] == "161"
    assert sorted(path.name for path in Path().iterdir()) == ["R-50-GN-WS.pth.tar", "r50.pth", "r50.yaml"]


def test_what_is_printed_is_what_is_documented(capsys):
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    command, printed = re.findall(r"```(?:bash|text)\n(.*?)```", page, re.DOTALL)[:2]
    save("R-50-GN-WS.pth.tar")

    assert main(shlex.split(command.removeprefix("ws-algorithm"))) == 0

    assert capsys.readouterr().out == printed


def test_the_recipe_is_a_base_that_resolves(capsys):
    save("R-50-GN-WS.pth.tar")
    run("R-50-GN-WS.pth.tar", "r50.pth", *RESNET)
    capsys.readouterr()
    Path("mine.yaml").write_text("base: [imagenet/resnet50_gn_ws, r50.yaml]\nroot: synthetic\n")

    assert main(["train", "mine.yaml", "--dry-run"]) == 0

    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["model"]["pretrained"] == str(Path("r50.pth").resolve())
    assert resolved["algorithms"]["WeightStandardization"]["formula"] == "paper"


def test_a_backbone_names_no_builder():
    weights = {name: tensor for name, tensor in save("all.pth").items() if ".fc." not in name}
    torch.save(weights, "jhu.pth")

    assert run("jhu.pth", "body.pth", *RESNET) == 0

    model = yaml.safe_load(Path("body.yaml").read_text())["model"]
    assert model == {"arch": "resnet50", "norm": "group", "pretrained": str(Path("body.pth").resolve())}


def test_a_network_that_no_recipe_builds_gets_no_recipe(capsys):
    save("bit.pth", "resnetv2_50x1_bit")
    Path("out.yaml").write_text("mine")

    assert run("bit.pth", "out.pth", "--to", "timm", "--model", "resnetv2_50x1_bit") == 0

    formula = torch.load("out.pth", weights_only=True)["ws_algorithm"]["formula"]
    assert (formula["eps"], formula["eps_inside_root"], formula["unbiased"]) == (1e-8, True, False)
    assert Path("out.yaml").read_text() == "mine"
    assert "recipe   none: no recipe builds this model" in capsys.readouterr().out


def test_builders_are_those_of_recipes():
    assert set(BUILDERS.values()) <= set(REGISTRY)
    assert set(BUILDERS) <= {kind for kind, _ in MODELS.values()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("w.pth", "there.pth", *RESNET), r"`OUT` \(='there.pth'\): there.pth would be replaced. Give `--overwrite`"),
        (("w.pth", "other.pth", *RESNET), r"`OUT` \(='other.pth'\): other.yaml would be replaced. Give `--overwrite`"),
        (("w.pth", "w.pth", *RESNET, "--overwrite"), r"`OUT` \(='w.pth'\) is the file that is to be converted"),
        (("w.pth", "out.yaml", *RESNET), r"`OUT` \(='out.yaml'\) is the name of its recipe"),
        (("w.pth", "no/out.pth", *RESNET), r"`OUT` \(='no/out.pth'\): there is no folder no"),
        (("w.pth", "folder", *RESNET, "--overwrite"), r"`OUT` \(='folder'\): folder is a folder"),
        (("nowhere.pth", "out.pth", *RESNET), r"`path` \(='nowhere.pth'\) must be a file, and there is none"),
        (("w.pth", "out.pth", "--to", "keras", "--model", "resnet50"), r"`--to` \(='keras'\) must be one of torchvis"),
        (("w.pth", "out.pth", "--to", "timm", "--model", "resnet50"), r"`--to` \(='timm'\) must be 'torchvision', wh"),
        (("w.pth", "out.pth", "--to", "torchvision", "--model", "vgg"), r"`--model` \(='vgg'\) must be one of resnet"),
        (("w.pth", "out.pth", *RESNET, "--source", "keras"), r"`source` \(='keras'\) must be one of weight_standard"),
    ],
)
def test_mistakes_end_with_one_line_and_change_nothing(capsys, arguments, message):
    save("w.pth")
    for name in ("there.pth", "other.yaml"):
        Path(name).write_text("mine")
    Path("folder").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in Path().iterdir()}

    assert run(*arguments) == 2

    printed = capsys.readouterr()
    first, line = printed.err.splitlines()
    assert (printed.out, first) == ("", "ws-algorithm convert: 1 mistake")
    assert re.search(message, line)
    assert {path: path.is_file() and path.read_bytes() for path in Path().iterdir()} == before


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch written",)


@pytest.mark.parametrize("name", ["w.pkl", "w.pth", "w.pth.tar"])
def test_a_file_that_would_run_something_is_refused_and_nothing_is_written(capsys, name):
    if name == "w.pkl":
        Path(name).write_bytes(pickle.dumps({"blobs": {"conv1_w": Evil()}}, protocol=2))
    else:
        torch.save({"state_dict": Evil()}, name, _use_new_zipfile_serialization=name == "w.pth")

    assert run(name, "out.pth", *RESNET) == 2

    assert f"`path` (='{name}') is refused: it names {os.system.__module__}.system" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == [name]


def test_what_is_there_is_replaced_if_that_is_meant():
    save("w.pth")
    for name in ("out.pth", "out.yaml"):
        Path(name).write_text("old")

    assert run("w.pth", "out.pth", *RESNET, "--overwrite") == 0

    assert "state_dict" in torch.load("out.pth", weights_only=True)
    assert "pretrained" in Path("out.yaml").read_text()


def test_a_disk_that_is_full_leaves_what_was_there(monkeypatch, capsys):
    save("w.pth")
    Path("out.pth").write_text("old")
    monkeypatch.setattr("ws_algorithm.recipes.convert.torch.save", _write_some_and_fail)

    assert run("w.pth", "out.pth", *RESNET, "--overwrite") == 2

    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in Path().iterdir() if path.name != "w.pth"} == {"out.pth": "old"}


def _write_some_and_fail(content: Any, path: Path) -> None:
    path.write_bytes(b"PK")
    raise OSError(28, "No space left on device")


def test_the_function_returns_what_it_wrote():
    save("w.pth")

    converted = convert("w.pth", "out.pth", to="torchvision", model="resnet50")

    assert (converted.source, len(converted.state_dict)) == ("weight_standardization", 161)
