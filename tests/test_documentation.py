"""Every block of code in the documentation runs, every command line in it is one that the program accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.models import ComposerClassifier
from torch import nn

from ws_algorithm.__main__ import _parse, main

ROOT = Path(__file__).parents[1]
VERBS = "train|evaluate|predict|inspect|export|convert|plot|benchmark|recipes"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "yamls").rglob("*.yaml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def what_readers_have() -> dict[str, Any]:
    """The names that the README's blocks take for granted."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
    small = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    return {
        "model": ComposerClassifier(network, num_classes=10),
        "train_dataloader": torch.utils.data.DataLoader(small, batch_size=2),
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "batches": [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))],
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    namespace = what_readers_have()
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_shows_three_ways_and_its_pages_have_code() -> None:
    readme, method = ROOT / "README.md", ROOT / "docs" / "method.md"
    assert len(blocks(readme, "python")) == 3 and len(blocks(readme, "bash")) == 5
    assert len(blocks(method, "python")) == 6


def commands() -> list[str]:
    """Command lines of the program in pages and in the headers of recipes, without comments."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    lines += [line.lstrip("# ") for recipe in RECIPES for line in recipe.read_text(encoding="utf-8").splitlines()]
    found = [re.search(rf"(?:ws-algorithm|-m ws_algorithm) ((?:{VERBS})\b[^#]*)", line) for line in lines]
    return sorted({match[1].strip() for match in found if match})


def test_there_are_commands_to_check() -> None:
    assert {"recipes", "train quickstart", "train quickstart algorithms=null"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_documented_commands_are_accepted(command: str) -> None:
    assert callable(_parse(shlex.split(command)).run)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("train")])
def test_documented_train_commands_resolve(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(command), *([] if "--dry-run" in command else ["--dry-run"])]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["name"]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("inspect")])
def test_documented_inspect_commands_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)) == 0
    assert " convolutions standardized with " in capsys.readouterr().out or "--json" in command


@pytest.mark.parametrize("block", [b for page in PAGES if page.name != "README.md" for b in blocks(page, "yaml")])
def test_documented_yaml_is_part_of_a_recipe(block: str, tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "yamls" / "quickstart.yaml").read_text(encoding="utf-8")) | yaml.safe_load(block)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "recipes.md", "text"))
def test_documented_mistakes_are_what_is_printed(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, expected = block.partition("\n")
    assert main(shlex.split(command.removeprefix("$ ws-algorithm "))) == 2
    assert capsys.readouterr().err == expected


def test_links_to_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
