"""Runs that several files look at; none of them writes outside its own folder."""

from pathlib import Path

import pytest

from ws_algorithm.recipes.train import train

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
