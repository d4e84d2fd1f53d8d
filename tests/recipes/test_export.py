import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file

from ws_algorithm import apply_weight_standardization
from ws_algorithm.__main__ import main
from ws_algorithm.recipes import artifacts, build, run_folder
from ws_algorithm.recipes.artifacts import FORMATS
from ws_algorithm.recipes.export import export
from ws_algorithm.recipes.loaded_run import find_trained
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .models.small_detectors import SMALL
from .runs import CHECKOUT, FEW, load_weights


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory) -> Path:
    """A copy of the finished run that files may be written to."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("exports") / "run", symlinks=True)


def network_of(run: Path) -> Any:
    """The network that the recipe of a run names, never standardized."""
    model = find_trained(str(run), []).recipe.model
    return build_cifar_resnet(**{key: value for key, value in model.items() if key != "name"}).module.eval()


def trained_network(run: Path) -> Any:
    """The network of the checkpoint, put together by hand: standardized as the recipe says."""
    network, algorithms = network_of(run), find_trained(str(run), []).recipe.algorithms
    assert algorithms is not None
    apply_weight_standardization(network, **algorithms["WeightStandardization"])
    weights = load_weights(run / "best.pt")
    network.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()}, strict=True)
    return network.eval()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_computes_what_the_trained_network_computes(run, name, capsys):
    images = torch.randn(3, 1, 8, 8)

    path = export(str(run), file_format=name)

    assert path.parent == run and not list(run.glob("*.partial"))
    printed = capsys.readouterr().out.split("\n")
    assert printed[0] == f"format      {name}" and printed[1].startswith(f"file        {path} (")
    assert printed[2] == "input       (4, 1, 8, 8), or any other number of images"
    assert printed[4] == f"checkpoint  {run / 'best.pt'}"
    read: Any = FORMATS[name].read(path)
    if name in ("state_dict", "safetensors"):
        network = network_of(run)
        network.load_state_dict(read, strict=True)
        read = network
    outputs = read(images)
    expected = trained_network(run)(images)
    outputs = outputs[0] if isinstance(outputs, list) else outputs
    assert float((outputs - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_the_names_are_those_of_the_network_that_the_recipe_names(run):
    path = export(str(run), file_format="state_dict")

    assert list(torch.load(path, weights_only=True)) == list(network_of(run).state_dict())


def test_plain_weights_are_the_raw_ones(run, tmp_path):
    path = export(str(run), file_format="safetensors", plain=True, output=str(tmp_path / "raw.safetensors"))

    saved = load_file(path)
    raw = {key.removeprefix("module."): value for key, value in load_weights(run / "best.pt").items()}
    assert set(saved) == set(network_of(run).state_dict())
    assert torch.equal(saved["conv1.weight"], raw["conv1.parametrizations.weight.original"])


def test_the_onnx_graph_has_no_node_of_the_standardization(run):
    exported = export(str(run), file_format="onnx").read_bytes()
    never_standardized = FORMATS["onnx"].write(network_of(run), torch.zeros(2, 1, 8, 8))  # pyright: ignore

    ours, never = (
        Counter(node.op_type for node in onnx.load_from_string(content).graph.node)
        for content in (exported, never_standardized)
    )
    del ours["Identity"], never["Identity"]  # for weights that are equal, such as biases of 0 before training
    assert ours == never and ours["Conv"] == 9


def test_the_command_and_a_recipe_with_a_checkpoint(run, capsys):
    assert main(["export", "quickstart", f"load_path={run / 'best.pt'}", "--format", "torchscript"]) == 2
    assert "`--output`: missing. Name the file to write" in capsys.readouterr().err

    command = ["export", "quickstart", f"load_path={run / 'best.pt'}", "--format", "torchscript", "--output", "net.ts"]
    assert main(command) == 0
    assert "file        net.ts (" in capsys.readouterr().out
    assert torch.jit.load("net.ts")(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_averaged_weights_are_those_that_are_evaluated():
    algorithms = "{WeightStandardization: {}, EMA: {half_life: 10ba}}"
    train("quickstart", [*FEW, f"algorithms={algorithms}", "save_folder=run"])
    run = Path("run")

    averaged = torch.load(export("run", file_format="state_dict"), weights_only=True)

    network = trained_network(run)
    assert not torch.equal(averaged["conv1.weight"], network.conv1.weight)
    state = torch.load(run / "best.pt", weights_only=False)["state"]
    ema = dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"]
    named = {key.removeprefix("module."): value for key, value in ema.items()}
    network.load_state_dict(named, strict=False)
    assert torch.equal(averaged["conv1.weight"], network.conv1.weight)


def test_a_file_that_computes_something_else_is_refused(run, tmp_path, monkeypatch):
    def wrong(network: Any, images: torch.Tensor) -> bytes:
        with torch.no_grad():
            list(network.parameters())[-1].add_(0.01)  # the bias of the classifier
        return FORMATS["torch_export"].write(network, images)  # pyright: ignore

    bad = artifacts.GraphFormat(".torchscript", wrong, FORMATS["torch_export"].read)  # pyright: ignore
    monkeypatch.setitem(FORMATS, "torchscript", bad)

    with pytest.raises(RecipeError, match=r"`--format` \(='torchscript'\): what the file computes differs .* removed"):
        export(str(run), file_format="torchscript", output=str(tmp_path / "net"))

    assert list(tmp_path.iterdir()) == []


def test_what_rounding_changes_is_no_mistake(run, monkeypatch):
    monkeypatch.setattr("ws_algorithm.recipes.export.TOLERANCE", 0.0)

    assert export(str(run), file_format="onnx").is_file()  # which sums in another order


def test_documented_commands_are_accepted(monkeypatch):
    given = []
    monkeypatch.setattr("ws_algorithm.recipes.export.export", lambda *args, **kwargs: given.append((args, kwargs)))
    page = (CHECKOUT / "docs" / "export.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ws-algorithm (export .*)$", page, re.MULTILINE)

    assert [main(shlex.split(command)) for command in commands] == [0] * 4
    assert given[2] == (
        ("quickstart", ["load_path=best.pt"]),
        {"file_format": "torchscript", "output": "digits.ts", "plain": False},
    )


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        ({"file_format": "pickle"}, "`--format` (='pickle') must be one of state_dict, safetensors, onnx"),
        ({"file_format": "onnx", "plain": True}, "`--plain`: onnx is the network itself, folded."),
        ({"file_format": "onnx", "output": "there"}, "`--output` (='there'): is there already."),
        ({"file_format": "onnx", "output": "nowhere/net"}, "`--output` (='nowhere/net'): its folder is not there"),
        ({"file_format": "onnx", "overrides": ["eval_dataloader=null"]}, "`eval_dataloader`: missing;"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(run, arguments, mistake, monkeypatch):
    Path("there").touch()
    monkeypatch.setattr("ws_algorithm.recipes.export.load_trained", None)

    with pytest.raises(RecipeError) as caught:
        export(str(run), **arguments)

    (error,) = caught.value.errors
    assert error.startswith(mistake)


def test_a_run_without_standardization_is_written_as_it_is(caplog):
    train("quickstart", [*FEW, "algorithms=null", "save_folder=plain"])

    saved = torch.load(export("plain", file_format="state_dict"), weights_only=True)

    weights = {key.removeprefix("module."): value for key, value in load_weights(Path("plain/best.pt")).items()}
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    assert "no standardized layer" not in caplog.text


@pytest.mark.parametrize("formula", ["affine", "scaled"])
def test_raw_weights_alone_are_refused_where_there_is_gain(formula):
    train("quickstart", [*FEW, f"algorithms={{WeightStandardization: {{formula: {formula}}}}}", "save_folder=gain"])

    with pytest.raises(RecipeError) as caught:
        export("gain", file_format="state_dict", plain=True)

    (error,) = caught.value.errors
    assert error.startswith("`--plain`: ") and "Leave `--plain` out" in error
    assert not list(Path("gain").glob("exported*")) and export("gain", file_format="state_dict").is_file()


def test_a_standardized_run_without_its_algorithm_is_told_in_one_line(run):
    with pytest.raises(RecipeError) as caught:
        export(str(run), ["algorithms=null"], file_format="state_dict")

    (error,) = caught.value.errors
    assert error.startswith("`algorithms` (=null): ") and "Leave `algorithms` as the recipe of the run" in error
    assert "conv1" not in error


def test_an_exported_file_is_gone_when_its_run_is_replaced():
    Path("run").mkdir()
    for name in ("exported.pt", "exported.raw.safetensors", "my.onnx"):
        Path("run", name).touch()

    run_folder.clear_run(Path("run"))

    assert [path.name for path in Path("run").iterdir()] == ["my.onnx"]


@pytest.fixture(scope="module")
def detector() -> Iterator[tuple[str, list[str]]]:
    """A recipe of a small detector and the overrides with a checkpoint of it that was never trained."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "start.pt"
        sizes = [f"model.{key}={value}" for key, value in SMALL.items() if key != "num_classes"]
        few = ["synthetic_image_size=64", "synthetic_num_classes=3", "num_workers=0"]
        data = [f"{key}.{value}" for key in ("train_dataloader", "eval_dataloader") for value in few]
        overrides = [*sizes, "model.num_classes=4", "root=synthetic", *data, f"load_path={checkpoint}"]
        recipe = "coco/faster_rcnn_r50_gn_ws_1x"
        torch.save({}, checkpoint)
        model = build.build_model(find_trained(recipe, overrides).recipe)
        apply_weight_standardization(model, layers="normalized")
        torch.save({"state": {"model": model.state_dict()}}, checkpoint)
        yield recipe, overrides


def test_a_detector_is_no_graph(detector):
    recipe, overrides = detector

    with pytest.raises(RecipeError, match="takes lists of images of any size.* as state_dict or safetensors"):
        export(recipe, overrides, file_format="torchscript", output="net")


def test_the_weights_of_a_detector(detector, capsys):
    recipe, overrides = detector

    path = export(recipe, overrides, file_format="safetensors", output="net.safetensors")

    assert "difference  0.0e+00 of the largest output" in capsys.readouterr().out
    assert {"backbone.body.conv1.weight", "rpn.head.conv.0.0.weight"} <= set(load_file(path))
    assert not any("parametrizations" in key for key in load_file(path))
