"""Runs that several files look at; none of them writes outside its own folder."""

from pathlib import Path

import pytest

from ws_algorithm.recipes.train import train

from . import painted
from .runs import FEW


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quickstart of two short epochs; to look at, not to change."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train("quickstart", [*FEW, "max_duration=2ep", f"save_folder={folder}"])
    return folder


@pytest.fixture(scope="session")
def painted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a detector that finds rectangles by their colour; to look at, not to change."""
    painted.register()
    return painted.run_painted(tmp_path_factory.mktemp("painted"))
