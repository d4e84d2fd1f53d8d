import shutil
from pathlib import Path

import pytest
import torch

from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW, FEW_FASHION, write_fashion_mnist

ACCURACY = "MulticlassAccuracy"


def evaluations(folder: Path) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    prefix = "metrics/eval/"
    found = [{name.removeprefix(prefix): row[name] for name in row if name.startswith(prefix)} for row in rows]
    return [evaluation for evaluation in found if evaluation]


def best_evaluation(folder: Path) -> dict[str, float]:
    return max(evaluations(folder), key=lambda evaluation: evaluation[ACCURACY])


def test_a_run_has_its_best_evaluation(finished_run, capsys):
    values = evaluate(str(finished_run))

    assert values == best_evaluation(finished_run)
    printed = capsys.readouterr().out
    assert printed.split()[:2] == ["metric", "value"]
    for name, value in values.items():
        assert [name, f"{value:.4f}"] in [line.split() for line in printed.splitlines()]
    assert f"checkpoint  {finished_run / 'best.pt'}" in printed


def test_the_best_need_not_be_the_last():
    destroying = "schedulers={name: MultiStepScheduler, milestones: [1ep], gamma: 1000}"
    train("quickstart", [*FEW, "max_duration=2ep", "train_subset_num_batches=20", destroying, "save_folder=run"])
    first, second = evaluations(Path("run"))
    assert first[ACCURACY] > second[ACCURACY]

    assert evaluate("run") == first
    assert evaluate("run", ["load_path=run/latest-rank0.pt"]) == second


@pytest.mark.parametrize("algorithms", ["{WeightStandardization: {}, EMA: {half_life: 10ba}}", "{MixUp: {}}", "null"])
def test_the_best_evaluation_with_other_algorithms(algorithms):
    train("quickstart", [*FEW, "train_subset_num_batches=20", f"algorithms={algorithms}", "save_folder=run"])

    assert evaluate("run") == best_evaluation(Path("run"))


def test_a_run_without_a_best_checkpoint_has_its_last(finished_run, tmp_path):
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    (folder / "best.pt").unlink()

    assert evaluate(str(folder)) == evaluations(folder)[-1]


def test_a_recipe_and_a_checkpoint(finished_run):
    assert evaluate("quickstart", [f"load_path={finished_run / 'best.pt'}"]) == best_evaluation(finished_run)


def test_other_data_for_a_run(finished_run):
    # 1,437 training images in three batches
    overrides = ["eval_dataloader.split=train", "global_eval_batch_size=479"]
    values = evaluate(str(finished_run), overrides)

    assert values != best_evaluation(finished_run)
    assert values == evaluate(str(finished_run), [*overrides, "eval_subset_num_batches=3"])
    assert values != evaluate(str(finished_run), [*overrides, "eval_subset_num_batches=2"])


def test_evaluation_writes_nothing(finished_run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}

    evaluate(str(finished_run))

    assert {path: path.stat().st_mtime_ns for path in finished_run.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_started_from_a_checkpoint_which_is_gone(finished_run):
    shutil.copy(finished_run / "best.pt", "start.pt")
    train("quickstart", [*FEW, "load_path=start.pt", "load_weights_only=true", "save_folder=run"])
    Path("start.pt").unlink()

    assert evaluate("run") == best_evaluation(Path("run"))


@pytest.mark.parametrize(
    ("overrides", "mistakes"),
    [
        ([], ["`load_path`: missing."]),
        (["eval_dataloader=null"], ["`eval_dataloader`: missing;", "`load_path`: missing."]),
        (["load_path=nowhere.pt"], ["`load_path` (='nowhere.pt'): there is no such file."]),
        (["model.depth=9", "load_path=nowhere.pt"], ["`load_path`", "`model`: `depth`"]),
    ],
)
def test_mistakes_are_listed(overrides, mistakes):
    with pytest.raises(RecipeError) as caught:
        evaluate("quickstart", overrides)

    assert len(caught.value.errors) == len(mistakes)
    for error, beginning in zip(caught.value.errors, mistakes, strict=True):
        assert error.startswith(beginning)


def test_a_run_without_checkpoints_is_refused(finished_run):
    Path("run").mkdir()
    shutil.copy(finished_run / "recipe.yaml", "run")

    with pytest.raises(RecipeError, match=r"`run` \(='run'\) has no checkpoint: neither best.pt nor latest-rank0.pt"):
        evaluate("run")


def test_a_folder_that_is_no_run_is_refused():
    Path("empty").mkdir()

    with pytest.raises(RecipeError, match=r"`recipe` \(='empty'\) is a folder"):
        evaluate("empty")


def test_standardized_weights_do_not_load_without_the_algorithm(finished_run):
    with pytest.raises(RecipeError, match=r"best\.pt.*module\.conv1\.weight"):
        evaluate(str(finished_run), ["algorithms=null"])


def test_plain_weights_are_not_taken_for_standardized_ones():
    train("quickstart", [*FEW, "algorithms=null", "save_folder=plain"])

    plain, standardized = evaluate("plain"), evaluate("quickstart", ["load_path=plain/best.pt"])

    # they load as raw weights, of another network
    assert plain != standardized


def test_a_run_does_not_need_the_weights_that_it_began_with():
    torch.save(build_cifar_resnet(10, depth=8, in_channels=1).module.state_dict(), "began.pt")
    train("quickstart", [*FEW, "model.pretrained=began.pt", "save_folder=run"])
    Path("began.pt").unlink()

    assert 0 <= evaluate("run")["MulticlassAccuracy"] <= 1


def run_fashion_mnist(*overrides: str) -> None:
    eight = ["train_dataloader.num_workers=0", "eval_dataloader.num_workers=0"]
    train("fashion_mnist/resnet20_gn_ws", [*FEW_FASHION, *eight, "save_folder=run", *overrides])


def test_the_root_of_a_run_can_be_another_one(monkeypatch):
    write_fashion_mnist(Path("data"))
    write_fashion_mnist(Path("other"), test=32)
    run_fashion_mnist()
    own = evaluate("run")
    other = evaluate("run", ["root=other"])
    Path("elsewhere").mkdir()

    monkeypatch.chdir("elsewhere")

    assert own == evaluate("../run") == best_evaluation(Path("../run"))
    assert other == evaluate("../run", ["root=../other"]) == evaluate("../run", ["eval_dataloader.root=../other"])
    assert other != own
    assert read_recipe(Path("../run/recipe.yaml"))[0].root == str(Path("../data").resolve())


def test_a_run_with_a_relative_root_continues_as_the_same(caplog):
    write_fashion_mnist(Path("data"))
    run_fashion_mnist()

    run_fashion_mnist("autoresume=true")
    assert "already trained" in caplog.text and "changed recipe" not in caplog.text

    run_fashion_mnist("autoresume=true", "root=synthetic")
    assert "root '" in caplog.text and "changed recipe" in caplog.text


def test_a_root_for_a_run_whose_data_have_none_is_told(finished_run, caplog):
    assert evaluate(str(finished_run), ["root=other"]) == best_evaluation(finished_run)
    assert "`root` (='other'): nothing in this recipe refers to it" in caplog.text


def test_the_formula_of_a_run_cannot_be_another_one(finished_run):
    override = "algorithms.WeightStandardization.formula"
    assert evaluate(str(finished_run), [f"{override}=bit"]) == best_evaluation(finished_run)  # another name of the same

    for formula in ("paper", "affine"):
        with pytest.raises(RecipeError, match=rf"best\.pt.*`formula` \(='{formula}'\).*trained, 'composer'"):
            evaluate(str(finished_run), [f"{override}={formula}"])


def test_neither_a_run_nor_a_recipe():
    with pytest.raises(
        RecipeError, match=r"`recipe` \(='runs/quick'\) is neither .* there is no runs/quick/recipe.yaml"
    ):
        evaluate("runs/quick")
