import re
from pathlib import Path

import pytest
import torch
from composer.callbacks import LRMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ws_algorithm import is_weight_standardized
from ws_algorithm.recipes.train import train

from .runs import FEW, is_same, load_state, load_weights, metric_rows


def run(*overrides: str, source: str = "quickstart", folder: str = "run") -> nn.Module:
    """The model that a short run has trained."""
    return train(source, [*FEW, f"save_folder={folder}", *overrides]).state.model


def last_weights(folder: str = "run") -> dict[str, torch.Tensor]:
    return load_weights(Path(folder) / "latest-rank0.pt")


def test_without_weight_standardization():
    model = run("algorithms=null")

    assert not is_weight_standardized(model)
    assert not [name for name in last_weights() if "parametrizations" in name]


def test_batch_norm_instead_of_group_norm():
    model = run("model.norm=batch")

    assert not [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    counts = [value for name, value in last_weights().items() if name.endswith("num_batches_tracked")]
    assert counts == 9 * [3 * 16 // 4]  # each micro-batch of four counts


def test_algorithms_of_composer_beside_ours():
    model = run(
        "algorithms.LabelSmoothing.smoothing=0.1",
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1e-9}",
        "algorithms.EMA={half_life: 2ba}",
        "optimizers.momentum=0",
        "optimizers.weight_decay=0",
        "schedulers=null",
    )
    names = [name for name, _ in load_state(Path("run/latest-rank0.pt"))["algorithms"]]

    assert sorted(names) == ["EMA", "GradientClipping", "LabelSmoothing", "WeightStandardization"]
    assert is_weight_standardized(model)
    # gradients of norm 1e-9 at a learning rate of 0.05 move nothing that float32 can tell from the first weights
    run("optimizers.lr=1e-30", "optimizers.momentum=0", "schedulers=null", folder="still")
    torch.testing.assert_close(last_weights(), last_weights("still"))


def test_other_loggers_get_the_same_metrics():
    run("loggers={FileLogger: {filename: run/file.txt}, TensorboardLogger: {log_dir: run/events}}")
    losses = [row["loss/train/total"] for row in metric_rows(Path("run")) if "loss/train/total" in row]

    written = re.findall(r"loss/train/total: (\S+)", Path("run/file.txt").read_text())
    assert [float(text) for text in written] == pytest.approx(losses, abs=1e-4)  # it writes four decimals
    events = EventAccumulator(str(next(Path("run/events").rglob("events*")).parent)).Reload()
    assert [event.value for event in events.Scalars("loss/train/total")] == pytest.approx(losses)


def test_without_evaluation_there_is_no_best_checkpoint():
    run("eval_dataloader=null")

    assert not Path("run/best.pt").exists() and Path("run/latest-rank0.pt").exists()
    assert not [name for row in metric_rows(Path("run")) for name in row if "eval" in name]


def test_a_callback_of_ones_own_choice_is_not_doubled():
    callbacks = train("quickstart", [*FEW, "callbacks.LRMonitor={}"]).state.callbacks

    assert [type(callback) for callback in callbacks].count(LRMonitor) == 1


def test_runs_of_the_same_seed_are_the_same():
    for folder, seed in (("first", 0), ("again", 0), ("other", 1)):
        run(f"seed={seed}", folder=folder)

    assert is_same(last_weights("first"), last_weights("again"))
    assert metric_rows(Path("first")) == metric_rows(Path("again"))
    assert not is_same(last_weights("first"), last_weights("other"))


@pytest.mark.parametrize(("norm", "same"), [("group", True), ("batch", False)])
def test_the_size_of_micro_batches_does_not_matter_unless_with_batch_norm(norm, same):
    for size in (1 if same else 2, 4):
        run(f"model.norm={norm}", f"device_train_microbatch_size={size}", "schedulers=null", folder=str(size))

    small, large = last_weights("1" if same else "2"), last_weights("4")
    trained = [name for name in small if "running" not in name and "tracked" not in name]
    distances = [(small[name] - large[name]).abs().max().item() for name in trained]
    # Weights are below 4, and the order of a sum of 16 gradients is worth a few units in the last place of each step
    assert (max(distances) < 1e-6) == same


def test_checkpoints_within_epochs_keep_as_many_as_asked():
    run("save_interval=1ba", "save_num_checkpoints_to_keep=2")

    assert sorted(path.name for path in Path("run").glob("ep*.pt")) == ["ep0-ba2-rank0.pt", "ep0-ba3-rank0.pt"]
