import dataclasses
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW, environment, is_same, load_state, load_weights, metric_rows

TWO_EPOCHS = [*FEW, "max_duration=2ep"]


def test_the_folder_has_the_recipe_checkpoints_metrics_curves_and_log(finished_run):
    assert {path.name for path in finished_run.iterdir()} == {
        "recipe.yaml",
        "ep2-ba6-rank0.pt",
        "latest-rank0.pt",
        "best.pt",
        "metrics.jsonl",
        "epochs.tsv",
        "curves.png",
        "log.txt",
    }
    assert os.readlink(finished_run / "latest-rank0.pt") == "ep2-ba6-rank0.pt"


def test_the_last_checkpoint_has_everything_and_the_best_one_weights(finished_run):
    last, best = load_state(finished_run / "latest-rank0.pt"), load_state(finished_run / "best.pt")

    assert {"model", "optimizers", "schedulers", "timestamp", "callbacks", "algorithms"} <= last.keys()
    assert "optimizers" not in best
    assert last["model"].keys() == best["model"].keys()
    raw = [name for name in last["model"] if name.endswith(".parametrizations.weight.original")]
    assert len(raw) == 9  # the convolutions of a network of depth 8: 3 * 2 + 1 + 2
    assert last["timestamp"]["Timestamp"]["batch"] == 6


def test_the_recipe_of_a_run_is_the_one_that_ran(finished_run):
    ran = resolve_recipe("quickstart", TWO_EPOCHS)

    again, errors = read_recipe(finished_run / "recipe.yaml")

    assert errors == []
    assert again == dataclasses.replace(ran, run_name="quickstart", save_folder=str(finished_run))
    assert resolve_recipe(str(finished_run / "recipe.yaml")) == again


def test_a_table_ends_the_run(capsys):
    train("quickstart", FEW)
    printed = capsys.readouterr().out
    rows = read_metrics(Path("runs/quickstart/metrics.jsonl"))
    loss = sum(row["loss/train/total"] for row in rows) / 3
    accuracy = rows[-1]["metrics/eval/MulticlassAccuracy"]

    words = [line.split() for line in printed.splitlines()]
    assert ["metric", "last", "best", "best", "epoch"] == words[0]
    assert ["train", "loss", f"{loss:.4f}"] in words
    assert ["MulticlassAccuracy", f"{accuracy:.4f}", f"{accuracy:.4f}", "1"] in words
    assert ["run", "folder", "runs/quickstart"] in words
    assert re.search(r"^images/s +[1-9]\d*$", printed, re.M)
    assert "last ep1-ba3-rank0.pt, best best.pt" in printed


def test_runs_are_numbered_and_one_of_them_can_be_replaced():
    for name in ("quickstart", "quickstart-2"):
        train("quickstart", FEW)
        assert read_recipe(Path(f"runs/{name}/recipe.yaml"))[0].run_name == name
    notes = Path("runs/quickstart-2/notes.txt")
    notes.touch()

    train("quickstart", [*FEW, "save_overwrite=true", "seed=1", "max_duration=2ba"])

    assert sorted(path.name for path in Path("runs").iterdir()) == ["quickstart", "quickstart-2"]
    assert notes.exists() and not notes.with_name("ep1-ba3-rank0.pt").exists()
    assert [row["batch"] for row in read_metrics(notes.with_name("metrics.jsonl"))] == [1, 2]


def test_a_folder_that_holds_a_run_is_refused(finished_run):
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}

    with pytest.raises(RecipeError, match=r"`save_folder` \(=.*already holds a run. Use autoresume=true"):
        train("quickstart", [*FEW, f"save_folder={finished_run}"])

    assert {path: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before


def test_mistakes_leave_no_folder(tmp_path):
    for overrides in (["model.depth=9"], ["train_dataloader={name: fashion_mnist, split: train, root: nowhere}"]):
        with pytest.raises(RecipeError):
            train("quickstart", [*FEW, *overrides])

    assert list(tmp_path.iterdir()) == []


class Fails(Callback):
    def fit_start(self, state: State, logger: Logger) -> None:
        raise KeyError("fails")


@pytest.mark.parametrize("fails", [False, True])
def test_logging_and_threads_are_left_as_they_were(fails, monkeypatch):
    root, ours, threads = logging.getLogger(), logging.getLogger("ws_algorithm"), torch.get_num_threads()
    monkeypatch.setitem(registry.CALLBACKS, "Fails", Fails)
    monkeypatch.setattr(ours, "level", logging.ERROR)
    torch.set_num_threads(2)  # quickstart asks for one
    before = [*root.handlers], root.level

    with pytest.raises(KeyError, match="fails") if fails else nullcontext():
        train("quickstart", [*FEW, "callbacks={Fails: {}}" if fails else "callbacks=null"])
    found = torch.get_num_threads()
    torch.set_num_threads(threads)

    assert ([*root.handlers], root.level, ours.level, found) == (*before, logging.ERROR, 2)


def test_a_finished_run_says_so_and_stays_as_it_is(finished_run, tmp_path, caplog):
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)

    train("quickstart", [*TWO_EPOCHS, f"save_folder={folder}", "autoresume=true"])

    assert f"{folder} is already trained for 2ep; nothing is left to do." in caplog.text
    assert metric_rows(folder) == metric_rows(finished_run)
    for name in ("latest-rank0.pt", "best.pt"):
        assert is_same(load_weights(folder / name), load_weights(finished_run / name))


def test_a_finished_run_goes_on_for_longer_and_says_what_changed(finished_run, tmp_path, caplog):
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    before = metric_rows(folder)

    train("quickstart", [*FEW, "max_duration=3ep", f"save_folder={folder}", "autoresume=true", "seed=1"])

    (said,) = [record.getMessage() for record in caplog.records if "changed recipe" in record.getMessage()]
    assert "max_duration '2ep' -> '3ep'" in said and "seed 0 -> 1" in said and "autoresume" not in said
    assert said in (folder / "log.txt").read_text()
    assert metric_rows(folder)[: len(before)] == before
    assert [row["batch"] for row in metric_rows(folder)[len(before) :]] == [7, 8, 9, 9]
    assert [path.name for path in folder.glob("ep*.pt")] == ["ep3-ba9-rank0.pt"]
    assert read_recipe(folder / "recipe.yaml")[0].max_duration == "3ep"


# Long enough to be killed in the second of two epochs; 21 is odd, so that save_interval=2ba falls within epochs
LONG = ["max_duration=2ep", "train_subset_num_batches=21"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train("quickstart", [*LONG, f"save_folder={folder}"])
    return folder


def start_and_kill(folder: Path, *overrides: str) -> None:
    """Start a run in a process of its own and kill that some batches into the second epoch."""
    command = [sys.executable, "-m", "ws_algorithm", "train", "quickstart", *LONG, *overrides, f"save_folder={folder}"]
    metrics = folder / "metrics.jsonl"
    with (folder.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not (metrics.exists() and '"batch": 27' in metrics.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder.parent / "output.txt"
                ).read_text()
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module", params=["1ep", "2ba"])
def killed(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "run"
    start_and_kill(folder, f"save_interval={request.param}")
    return folder


@pytest.mark.parametrize("damaged", [False, True], ids=["as it was", "cut off and without a link"])
def test_a_killed_run_ends_as_if_it_had_not_been(killed, uninterrupted, damaged, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "run", symlinks=True)
    (newest,) = folder.glob("ep*.pt")
    saved = int(re.findall(r"ba(\d+)", newest.name)[0])
    assert 21 <= saved < 42 and metric_rows(folder)[-1]["batch"] > saved
    if damaged:
        content = newest.read_bytes()
        newest.with_name(f"ep1-ba{saved + 1}-rank0.pt").write_bytes(content[: len(content) // 2])
        (folder / "latest-rank0.pt").unlink()
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"epoch": 1.9')

    train("quickstart", [*LONG, f"save_folder={folder}", "autoresume=true"])

    assert is_same(load_weights(folder / "latest-rank0.pt"), load_weights(uninterrupted / "latest-rank0.pt"))
    assert is_same(load_weights(folder / "best.pt"), load_weights(uninterrupted / "best.pt"))
    assert metric_rows(folder) == metric_rows(uninterrupted)
    assert len(list(folder.glob("ep*.pt"))) == 1
