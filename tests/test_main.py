import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes.runs import FEW, YAMLS, environment

from ws_algorithm import __main__ as command
from ws_algorithm.__main__ import main
from ws_algorithm.recipes.catalogue import describe, shipped_recipes
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.resolve import resolve_recipe

FOUR_MISTAKES = ["model.nrom=batch", "optimizers.name=SDG", "max_duration=3epp", "device_train_microbatch_size=3"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_training_and_evaluating_succeed(capsys):
    assert main(["train", "quickstart", *FEW]) == 0
    assert "run folder   runs/quickstart" in capsys.readouterr().out

    assert main(["evaluate", "runs/quickstart"]) == 0
    accuracy = read_metrics(Path("runs/quickstart/metrics.jsonl"))[-1]["metrics/eval/MulticlassAccuracy"]
    assert f"MulticlassAccuracy  {accuracy:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["train", "quickstart"], ["train", "quickstart", "--dry-run"]])
def test_four_mistakes_are_printed_at_once(arguments, capsys):
    assert main([*arguments, *FOUR_MISTAKES]) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    first, *others = printed.err.splitlines()
    assert first == "quickstart: 4 mistakes"
    assert [line[:4] for line in others] == ["  `m", "  `o", "  `m", "  `d"]


def test_a_process_with_mistakes_exits_with_two_and_no_traceback():
    command = [sys.executable, "-m", "ws_algorithm", "train", "quickstart", *FOUR_MISTAKES]

    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("quickstart: 4 mistakes\n") and len(done.stderr.splitlines()) == 5


@pytest.mark.parametrize("arguments", [["recipes"], ["train", "--help"]])
def test_output_that_nobody_reads_ends_it_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ws_algorithm", *arguments],
            env=environment() | {"PYTHONUNBUFFERED": ""},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (1, "")


def test_another_broken_pipe_is_no_quiet_end(monkeypatch):
    def broken(options: object) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(command, "_recipes", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["recipes"])


def test_one_of_several_processes_prints_mistakes(capsys, monkeypatch):
    for rank, lines in (("0", 5), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["evaluate", "quickstart", *FOUR_MISTAKES]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_name_that_is_nearly_one_is_suggested(capsys):
    assert main(["train", "quikstart"]) == 2

    printed = capsys.readouterr().err
    assert printed.startswith("quikstart: 1 mistake\n") and "Did you mean quickstart?" in printed


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
@pytest.mark.parametrize("order", ["before", "between", "after"])
def test_a_dry_run_prints_the_recipe(path, order, capsys, tmp_path):
    overrides = ["max_duration=3ep", "seed=7"]
    arguments = {
        "before": ["--dry-run", str(path), *overrides],
        "between": [str(path), overrides[0], "--dry-run", overrides[1]],
        "after": [str(path), *overrides, "--dry-run"],
    }[order]

    assert main(["train", *arguments]) == 0
    assert list(tmp_path.iterdir()) == []
    Path("printed.yaml").write_text(capsys.readouterr().out)
    again, errors = read_recipe(Path("printed.yaml"))

    assert errors == []
    assert again == resolve_recipe(str(path), overrides)
    assert (again.max_duration, again.seed) == ("3ep", 7)


def test_recipes_are_listed_with_a_line_each(capsys):
    assert main(["recipes"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1) for line in lines] == [
        [name, describe(path)] for name, path in shipped_recipes().items()
    ]
    assert len(lines) == len(YAMLS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "quickstart"],
        ["train"],
        ["train", "--dry-run"],
        ["train", "quickstart", "--dryrun"],
        ["train", "quickstart", "-n", "2"],
        ["evaluate"],
        ["evaluate", "runs/quickstart", "--dry-run"],
        ["plot"],
        ["plot", "runs/quickstart", "--dry-run"],
        ["recipes", "quickstart"],
        ["--version-of-what"],
    ],
)
def test_a_command_that_is_none_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage: ws-algorithm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (SystemExit(130), 130), (SystemExit(143), 143)]
)
def test_an_interruption_says_how_to_go_on(raised, code, monkeypatch, capsys):
    def interrupted(options: object) -> None:
        raise raised

    monkeypatch.setattr(command, "_train", interrupted)

    assert main(["train", "quickstart"]) == code
    assert "interrupted; the same command with autoresume=true continues the run" in capsys.readouterr().err


@pytest.mark.parametrize("raised", [RuntimeError("broken"), SystemExit(3)])
def test_other_failures_are_not_hidden(raised, monkeypatch):
    def broken(options: object) -> None:
        raise raised

    monkeypatch.setattr(command, "_train", broken)

    with pytest.raises(type(raised)) as caught:
        main(["train", "quickstart"])
    assert caught.value is raised


def test_a_process_that_is_interrupted_exits_with_130():
    command = [sys.executable, "-m", "ws_algorithm", "train", "quickstart", "save_folder=run"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = Path("run/metrics.jsonl"), time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130, errors
    assert "interrupted; the same command with autoresume=true continues the run" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes"]])
def test_help_and_the_list_of_recipes_import_nothing_heavy(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['ws-algorithm', *{arguments!r}]\n"
        "try:\n    runpy.run_module('ws_algorithm', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print('loaded', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )

    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    assert not loaded & {"torch", "composer", "torchvision", "sklearn", "matplotlib"}
    assert "ws_algorithm" in loaded
