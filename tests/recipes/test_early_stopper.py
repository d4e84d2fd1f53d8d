"""A run that stops early stops at the same place when it was killed on the way, and stays stopped."""

from pathlib import Path

import torch

from ws_algorithm.recipes.train import train

# The learning rate of 0 makes no evaluation better than the first: after one more than `patience` it stops
STOPPING = [
    "max_duration=8ep",
    "train_subset_num_batches=2",
    "device_train_microbatch_size=null",
    "optimizers.lr=0.0",
    "progress_bar=false",
    "callbacks={EarlyStopper: {monitor: MulticlassAccuracy, dataloader_label: eval, patience: 2ep}}",
]


def epochs(folder: str) -> int:
    state = torch.load(Path(folder) / "latest-rank0.pt", weights_only=False)["state"]
    return int(state["timestamp"]["Timestamp"]["epoch"])


def test_a_run_in_two_parts_stops_where_a_whole_one_does():
    train("quickstart", [*STOPPING, "save_folder=whole"])
    train("quickstart", [*STOPPING, "save_folder=parts", "max_duration=2ep", "schedulers=null"])
    train("quickstart", [*STOPPING, "save_folder=parts", "autoresume=true", "schedulers=null"])

    # the first evaluation is after epoch 1; the first that is more than two epochs later is after epoch 4
    assert epochs("whole") == epochs("parts") == 4


def test_a_run_that_has_stopped_stays_as_it_is():
    train("quickstart", [*STOPPING, "save_folder=run"])
    metrics = Path("run/metrics.jsonl").read_text()

    train("quickstart", [*STOPPING, "save_folder=run", "autoresume=true"])

    assert epochs("run") == 4
    assert Path("run/metrics.jsonl").read_text() == metrics
