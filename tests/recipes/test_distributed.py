"""Two processes with gloo, as `composer -n 2` starts them."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.train import train

from .runs import CHECKOUT, FEW, environment, load_weights
from .texts import class_rows

SCRIPT = """
import hashlib, sys
from pathlib import Path
from composer.utils import dist
from leaving import leave_together
from recipes import painted
from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.train import train

trainer = train("quickstart", sys.argv[1:])
data = b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.state.model.parameters())
hashes = dist.all_gather_object(hashlib.sha256(data).hexdigest())
Path(f"rank{dist.get_global_rank()}.txt").write_text(" ".join(hashes))
evaluate("two", ["eval_dataloader.split=train", "global_eval_batch_size=1436"], per_class=True)
painted.register()
evaluate("painted", output="painted-two.json")
leave_together()
"""


def launch(*arguments: str) -> str:
    """Run two processes in the current folder, which must succeed, and return what the first one printed."""
    command = [sys.executable, "-m", "composer.cli", "-n", "2", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_trains_in_two_processes():
    printed = launch("-m", "ws_algorithm", "train", str(CHECKOUT / "yamls" / "quickstart.yaml"), "max_duration=3ba")

    folder = Path("runs/quickstart")
    assert [path.name for path in Path("runs").iterdir()] == ["quickstart"]
    assert [row["batch"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]
    assert read_metrics(folder / "metrics.jsonl")[-1]["sample"] == 3 * 16  # of both processes
    assert printed.count("run folder") == 1 and "runs/quickstart" in printed
    assert load_weights(folder / "latest-rank0.pt").keys() == load_weights(folder / "best.pt").keys()


def test_both_processes_have_the_weights_that_one_would_have(painted_run, capsys):
    shutil.copytree(painted_run, "painted", symlinks=True)
    overrides = [*FEW, "train_dataloader.augment=false", "schedulers=null"]
    Path("script.py").write_text(SCRIPT)

    printed = launch("script.py", *overrides, "save_folder=two")
    train("quickstart", [*overrides, "save_folder=one"])

    first, second = (Path(f"rank{rank}.txt").read_text().split() for rank in (0, 1))
    assert len(first) == 2 and len({*first, *second}) == 1
    one, two = (load_weights(Path(folder) / "latest-rank0.pt") for folder in ("one", "two"))
    # Each step averages the gradients of the same sixteen images in another order
    torch.testing.assert_close(dict(two), dict(one), rtol=0.0, atol=1e-6)
    accuracies = [
        read_metrics(Path(f) / "metrics.jsonl")[-1]["metrics/eval/MulticlassAccuracy"] for f in ("one", "two")
    ]
    assert accuracies[0] == accuracies[1]

    # 1,437 images: the sampler repeats one of them, which is alone in the last batch of the second process
    capsys.readouterr()
    evaluate("two", ["eval_dataloader.split=train", "global_eval_batch_size=1437"], per_class=True)
    classes = class_rows(capsys.readouterr().out)
    assert class_rows(printed) == classes
    assert sum(images for _, images, _ in classes) == 1437

    # Five images: here the sampler repeats one of them too
    evaluate(str(painted_run), output="painted-one.json")
    assert Path("painted-two.json").read_bytes() == Path("painted-one.json").read_bytes()
