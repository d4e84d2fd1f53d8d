"""Scripts that run in two processes, with a process group between them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def run_in_two_processes(script: str | Path, *arguments: str) -> None:
    """Run a script of this folder in two processes of one thread each, which must succeed."""
    command = [sys.executable, "-m", "composer.cli", "-n", "2", str(script), *arguments]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def results_of_two_processes(script: str | Path, folder: Path) -> list[Any]:
    """Run a script that writes the results of each process into the folder, as ``0.pt`` and ``1.pt``."""
    run_in_two_processes(script, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
