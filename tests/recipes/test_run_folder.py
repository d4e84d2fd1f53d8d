import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ws_algorithm.recipes import run_folder
from ws_algorithm.recipes.run_folder import claim_run_folder, clear_run, remove_old_checkpoints, repair_checkpoints

LATEST = "latest-rank0.pt"


def checkpoint(folder: Path, batch: int, *, cut_off: bool = False) -> Path:
    buffer = io.BytesIO()
    torch.save({"state": torch.arange(100)}, buffer)
    content = buffer.getvalue()
    path = folder / f"ep1-ba{batch}-rank0.pt"
    path.write_bytes(content[: len(content) // 2] if cut_off else content)
    return path


def link(folder: Path, target: str) -> None:
    (folder / LATEST).symlink_to(target)


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").touch()
    return folder


def choose(*, name: str | None = None, resume: bool = False, overwrite: bool = False, into: str = "runs/{run_name}"):
    return claim_run_folder(into, name, "quickstart", autoresume=resume, overwrite=overwrite)


def test_runs_are_numbered_from_the_second_on():
    found = []
    for _ in range(3):
        folder, name = choose()
        found.append((folder.as_posix(), name))
        make_run(folder)

    assert found == [
        ("runs/quickstart", "quickstart"),
        ("runs/quickstart-2", "quickstart-2"),
        ("runs/quickstart-3", "quickstart-3"),
    ]


@pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
def test_going_on_takes_the_newest_run(how):
    assert choose(**how)[1] == "quickstart"

    for name, newest in (("quickstart", "quickstart"), ("quickstart-2", "quickstart-2")):
        make_run(Path("runs") / name)
        assert choose(**how) == (Path("runs") / newest, newest)


def test_going_on_takes_the_highest_number_when_one_is_missing():
    make_run(Path("runs/quickstart"))
    make_run(Path("runs/quickstart-3"))

    assert choose(resume=True)[1] == "quickstart-3"


def test_a_folder_that_is_there_is_not_taken_unless_it_was_chosen():
    """It may be that of a run which has just begun."""
    Path("runs/quickstart").mkdir(parents=True)
    Path("runs/quickstart/notes.txt").touch()

    assert choose()[1] == "quickstart-2"
    assert choose(name="quickstart")[1] == "quickstart"


def test_runs_that_start_at_once_get_folders_of_their_own():
    with ThreadPoolExecutor(8) as pool:
        folders = [future.result()[0] for future in [pool.submit(choose) for _ in range(32)]]

    assert len(set(folders)) == 32 and all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_made_is_an_error():
    Path("runs").touch()

    with pytest.raises(OSError):
        choose()


@pytest.mark.parametrize("file", ["metrics.jsonl", "best.pt", "ep1-ba3-rank0.pt"])
def test_each_of_its_files_shows_a_run(file):
    Path("runs/quickstart").mkdir(parents=True)
    (Path("runs/quickstart") / file).touch()

    with pytest.raises(ValueError, match="already holds a run"):
        choose(name="quickstart")


@pytest.mark.parametrize(
    ("name", "into"), [("mine", "runs/{run_name}"), (None, "runs/mine"), ("other", "runs/mine"), ("mine", "runs/mine")]
)
def test_a_chosen_folder_is_not_numbered(name, into):
    folder, run_name = choose(name=name, into=into)
    assert (folder, run_name) == (Path("runs/mine"), name or "quickstart")

    make_run(folder)

    assert choose(name=name, into=into, resume=True)[0] == choose(name=name, into=into, overwrite=True)[0] == folder
    with pytest.raises(ValueError, match=r"`save_folder` \(='runs/mine'\) already holds a run. Use autoresume=true"):
        choose(name=name, into=into)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert choose(into="~/runs/{run_name}")[0] == tmp_path / "runs" / "quickstart"


def test_clearing_removes_the_files_of_a_run_and_nothing_else(tmp_path):
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 6, cut_off=True)
    link(tmp_path, "ep1-ba6-rank0.pt")
    for name in ("recipe.yaml", "metrics.jsonl", "log.txt", "curves.png", "best.pt"):
        (tmp_path / name).touch()
    others = ["notes.txt", "ep1.pt", "my-ep1-ba3-rank0.pt", "latest.pt", "metrics.jsonl.bak"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()

    clear_run(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {*others, "logs"}
    clear_run(tmp_path)


@pytest.mark.parametrize("before", [None, "ep1-ba3-rank0.pt", "ep1-ba9-rank0.pt", "nowhere.pt"])
@pytest.mark.parametrize("cut_off", [(), (9,)])
def test_the_newest_whole_checkpoint_becomes_the_latest(tmp_path, before, cut_off):
    for batch in (3, 9, 10):  # 10 sorts before 9 as text
        checkpoint(tmp_path, batch, cut_off=batch in cut_off)
    if before is not None:
        link(tmp_path, before)

    assert repair_checkpoints(tmp_path) == tmp_path / "ep1-ba10-rank0.pt"
    assert (tmp_path / LATEST).is_symlink()
    assert (tmp_path / LATEST).resolve() == (tmp_path / "ep1-ba10-rank0.pt").resolve()
    assert {path.name for path in tmp_path.iterdir()} == {
        LATEST,
        *(f"ep1-ba{batch}-rank0.pt" for batch in (3, 9, 10) if batch not in cut_off),
    }


@pytest.mark.parametrize("linked", [False, True])
def test_a_cut_off_newest_checkpoint_is_removed(tmp_path, linked):
    checkpoint(tmp_path, 3)
    newest = checkpoint(tmp_path, 6, cut_off=True)
    if linked:
        link(tmp_path, newest.name)

    assert repair_checkpoints(tmp_path) == tmp_path / "ep1-ba3-rank0.pt"
    assert not newest.exists()
    assert run_folder.latest_checkpoint(tmp_path) == (tmp_path / "ep1-ba3-rank0.pt").resolve()


def test_the_link_can_be_moved_with_its_folder(tmp_path):
    (tmp_path / "old").mkdir()
    checkpoint(tmp_path / "old", 3)
    repair_checkpoints(tmp_path / "old")

    moved = (tmp_path / "old").rename(tmp_path / "new")

    assert run_folder.latest_checkpoint(moved) == (moved / "ep1-ba3-rank0.pt").resolve()


@pytest.mark.parametrize("linked", [False, True])
def test_nothing_whole_leaves_nothing(tmp_path, linked):
    checkpoint(tmp_path, 3, cut_off=True)
    if linked:
        link(tmp_path, "ep1-ba3-rank0.pt")

    assert repair_checkpoints(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert repair_checkpoints(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [10]), (2, [9, 10]), (3, [3, 9, 10]), (5, [3, 9, 10]), (-1, [3, 9, 10])]
)
def test_old_checkpoints_are_removed(tmp_path, keep, left):
    for batch in (3, 9, 10):
        checkpoint(tmp_path, batch)

    remove_old_checkpoints(tmp_path, keep)

    assert {path.name for path in tmp_path.iterdir()} == {f"ep1-ba{batch}-rank0.pt" for batch in left}


def test_the_best_checkpoint_is_evaluated_before_the_latest(tmp_path):
    with pytest.raises(ValueError, match=r"`run` \(=.* has no checkpoint: neither best.pt nor latest-rank0.pt"):
        run_folder.best_or_latest_checkpoint(tmp_path)

    checkpoint(tmp_path, 3)
    link(tmp_path, "ep1-ba3-rank0.pt")
    assert run_folder.best_or_latest_checkpoint(tmp_path) == (tmp_path / "ep1-ba3-rank0.pt").resolve()

    (tmp_path / "best.pt").touch()
    assert run_folder.best_or_latest_checkpoint(tmp_path) == tmp_path / "best.pt"


def test_writing_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("old and longer")

    run_folder.write_atomically(path, "néw")

    assert path.read_text(encoding="utf-8") == "néw"
    assert list(tmp_path.iterdir()) == [path]
