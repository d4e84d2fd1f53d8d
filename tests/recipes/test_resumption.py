"""Interruptions at chosen places, in this process; `test_train.py` kills a run from outside."""

import shutil
from pathlib import Path

import pytest
from composer.core import Callback, Event, State
from composer.loggers import Logger

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.train import train

from .runs import FEW, FEW_FASHION, is_same, load_state, load_weights, metric_rows, write_fashion_mnist

# Three epochs of five batches
LONG = [*FEW, "max_duration=3ep", "train_subset_num_batches=5"]


class Interrupt(Callback):
    """Stops a run at an event of a batch; what was written by then stays, as after a kill."""

    def __init__(self, event: str, batch: int) -> None:
        self.event, self.batch = event, batch

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event.value == self.event and int(state.timestamp.batch) >= self.batch:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _can_be_interrupted(monkeypatch):
    monkeypatch.setitem(registry.CALLBACKS, "Interrupt", Interrupt)


def interrupted_and_resumed(folder: Path, event: str, batch: int, *overrides: str, source: str = "quickstart") -> None:
    overrides = (*LONG, *overrides, f"save_folder={folder}")
    with pytest.raises(KeyboardInterrupt):
        train(source, [*overrides, f"callbacks.Interrupt={{event: {event}, batch: {batch}}}"])
    train(source, [*overrides, "autoresume=true"])


def assert_same_runs(first: Path, second: Path) -> None:
    for checkpoint in ("latest-rank0.pt", "best.pt"):
        assert is_same(load_weights(first / checkpoint), load_weights(second / checkpoint)), checkpoint
    assert metric_rows(first) == metric_rows(second)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train("quickstart", [*LONG, f"save_folder={folder}"])
    return folder


@pytest.mark.parametrize(
    ("event", "batch"),
    [
        ("batch_end", 2),  # before the first checkpoint
        ("before_backward", 7),
        ("eval_start", 10),
        ("epoch_checkpoint", 10),
    ],
)
def test_with_a_checkpoint_per_epoch(event, batch, uninterrupted):
    interrupted_and_resumed(Path("run"), event, batch)

    assert_same_runs(Path("run"), uninterrupted)


@pytest.mark.parametrize(("event", "batch"), [("before_backward", 8), ("batch_checkpoint", 8)])
def test_with_checkpoints_within_epochs(event, batch, uninterrupted):
    interrupted_and_resumed(Path("run"), event, batch, "save_interval=2ba")

    assert_same_runs(Path("run"), uninterrupted)


@pytest.mark.filterwarnings("ignore:No batches were trained for global rank 0:UserWarning:composer.trainer.trainer")
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning:torchmetrics.utilities.prints")
def test_with_a_checkpoint_after_the_last_batch_of_an_epoch(uninterrupted):
    interrupted_and_resumed(Path("run"), "eval_start", 10, "save_interval=5ba")

    assert is_same(load_weights(Path("run/latest-rank0.pt")), load_weights(uninterrupted / "latest-rank0.pt"))
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (Path("run"), uninterrupted))
    assert [row | {"seconds": 0} for row in found] == [row | {"seconds": 0} for row in expected]


@pytest.mark.parametrize(
    "override",
    [
        "model.norm=batch",
        "algorithms.EMA={half_life: 3ba}",
        "algorithms.MixUp={}",
        "optimizers={name: AdamW, lr: 0.01}",
    ],
)
def test_with_other_things_to_remember(override):
    train("quickstart", [*LONG, override, "save_folder=whole"])

    interrupted_and_resumed(Path("run"), "batch_end", 8, override, "save_interval=2ba")

    assert_same_runs(Path("run"), Path("whole"))


@pytest.mark.parametrize(("workers", "interval"), [(0, "2ba"), (1, "1ep"), (1, "2ba")])
def test_with_images_that_worker_processes_augment(workers, interval):
    write_fashion_mnist(Path("data"), train=40)
    overrides = [*FEW_FASHION, f"train_dataloader.num_workers={workers}", f"save_interval={interval}", *LONG]
    train("fashion_mnist/resnet20_gn_ws", [*overrides, "save_folder=whole"])

    interrupted_and_resumed(Path("run"), "batch_end", 8, *overrides, source="fashion_mnist/resnet20_gn_ws")

    assert_same_runs(Path("run"), Path("whole"))


def test_twice(uninterrupted):
    overrides = [*LONG, "save_interval=2ba", "save_folder=run", "autoresume=true"]
    for batch in (4, 9):
        with pytest.raises(KeyboardInterrupt):
            train("quickstart", [*overrides, f"callbacks.Interrupt={{event: batch_end, batch: {batch}}}"])
    train("quickstart", overrides)

    assert_same_runs(Path("run"), uninterrupted)


def test_without_checkpoints_it_starts_again(uninterrupted):
    folder = shutil.copytree(uninterrupted, "run", symlinks=True)
    for path in Path(folder).glob("*.pt"):
        path.unlink()

    train("quickstart", [*LONG, "save_folder=run", "autoresume=true"])

    assert_same_runs(Path("run"), uninterrupted)


@pytest.mark.filterwarnings("ignore:WeightStandardization is not in the state_dict:UserWarning")
def test_a_run_without_it_goes_on_with_it():
    train("quickstart", [*FEW, "algorithms=null", "save_folder=run"])
    plain = load_state(Path("run/latest-rank0.pt"))["optimizers"]["SGD"]["state"]

    trainer = train("quickstart", [*FEW, "max_duration=2ep", "save_folder=run", "autoresume=true"])

    kept = load_state(Path("run/latest-rank0.pt"))["optimizers"]["SGD"]["state"]
    assert {name.replace(".parametrizations.weight.original", ".weight") for name in kept} == plain.keys()
    assert len(kept) == len(plain) and kept.keys() != plain.keys()
    assert trainer.state.timestamp.batch == 6
