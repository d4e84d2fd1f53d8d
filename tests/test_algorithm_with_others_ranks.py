"""The algorithm in two processes with gloo, as `composer -n 2` starts them."""

import json
from pathlib import Path
from typing import Any

import pytest
from composed_runs import bottlenecks, standardizable
from two_processes import TESTS, run_in_two_processes
from two_ranks import AGREE, DIFFER

Results = dict[str, list[Any]]


def launch(cases: str, names: list[str], folder: Path) -> Results:
    """Run the cases in two processes and return, for each case, what either process wrote."""
    run_in_two_processes(TESTS / "two_ranks.py", cases, str(folder))
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in names}


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch("agree", list(AGREE), tmp_path_factory.mktemp("agree"))


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch("differ", list(DIFFER), tmp_path_factory.mktemp("differ"))


@pytest.mark.parametrize("layers", ["all", "normalized"])
def test_stochastic_depth_leaves_both_processes_the_same_choice(layers, agreeing):
    every = sorted(standardizable(bottlenecks(blocks=(2, 2, 2, 2))))

    assert len(every) == 1 + 4 * (2 * 3 + 1)  # the stem; three in each block and one in each shortcut
    assert agreeing[layers] == [every, every]


def test_so_it_does_where_the_last_convolution_is_left_out(agreeing):
    first, second = agreeing["surgeries"]

    assert first == second
    assert len(first) == 16 and "module.layer4.0.downsample.0.conv" not in first


def test_the_same_choice_in_another_order_of_execution_is_no_difference(agreeing):
    assert agreeing["order"] == [["module.0.left", "module.0.right", "module.3"]] * 2


@pytest.mark.parametrize(
    "case, differences",
    [
        ("extra", ["side_branch"]),
        ("exclude", ["module.0", "module.3"]),
        ("count", ["module.6"]),
        ("layers", ["module.6"]),
        ("pattern", ["side_branch"]),  # matches a convolution of one process only
        ("refused", ["module.3"]),  # cannot be standardized in one process
        ("surgery", ["layer2.0.conv2"]),
    ],
)
def test_processes_with_different_choices_all_stop_and_say_what_differs(case, differences, differing):
    for result in differing[case]:
        assert list(result) == ["ValueError"]
        assert all(name in result["ValueError"] for name in differences)
