"""What ``evaluate`` prints of a detector, and the file of COCO results that it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ws_algorithm.recipes import run_folder
from ws_algorithm.recipes.coco_metrics import CocoEvaluation
from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.schema import RecipeError

from .painted import CATEGORIES, IDS, OBJECTS

# The order in which COCO's program gives its twelve figures
SUMMARY = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def table_of(printed: str) -> dict[str, list[str]]:
    """The cells by the name of their row."""
    rows = [line.split() for line in printed.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in SUMMARY}


def official_figures(annotations: Path, results: Any, kind: str) -> dict[str, float]:
    coco = COCO(str(annotations))
    evaluation = COCOeval(coco, coco.loadRes(results), kind)  # pyright: ignore[reportArgumentType]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(SUMMARY, map(float, evaluation.stats), strict=True))


def test_the_file_gives_the_figures_that_are_printed(painted_run, tmp_path, capsys):
    values = evaluate(str(painted_run), output="found.json")
    rows = table_of(capsys.readouterr().out)

    annotations = painted_run.parent / "data" / "annotations" / "instances_val2017.json"
    results = json.loads(Path("found.json").read_text())
    boxes = official_figures(annotations, "found.json", "bbox")
    # COCO's program would take the areas of boxes for those of masks
    masks = official_figures(annotations, [{k: v for k, v in r.items() if k != "bbox"} for r in results], "segm")
    assert list(rows) == SUMMARY
    assert rows == {name: [f"{boxes[name]:.4f}", f"{masks[name]:.4f}"] for name in SUMMARY}
    assert values["BoxAP"] == pytest.approx(boxes["AP"]) and values["MaskAP"] == pytest.approx(masks["AP"])
    assert 0 < boxes["AP"] < 1 and 0 < masks["AP"] < 1


def test_results_have_the_ids_of_the_file(painted_run):
    evaluate(str(painted_run), output="found.json")
    results = json.loads(Path("found.json").read_text())

    ids = [result["image_id"] for result in results]
    assert ids == sorted(ids) and set(ids) == {number for number in IDS if OBJECTS[number]}
    (first,) = [result for result in results if result["image_id"] == 4]
    assert first["category_id"] == list(CATEGORIES)[0]
    assert first["bbox"] == list(OBJECTS[4][1])
    assert first["score"] == torch.tensor(0.9).item()
    assert isinstance(first["segmentation"]["counts"], str) and first["segmentation"]["size"] == [48, 64]


def test_the_results_of_a_run_are_in_its_folder(painted_run, capsys):
    folder = Path(shutil.copytree(painted_run, "run", symlinks=True))
    evaluate("run", ["eval_subset_num_batches=1"])
    assert "results     run/detections.json (3 detections in 2 images)" in capsys.readouterr().out

    evaluate("run")
    # five images, of which one has no object: 2 + 1 + 0 + 2 + 3
    assert "results     run/detections.json (8 detections in 5 images)" in capsys.readouterr().out
    assert len(json.loads((folder / "detections.json").read_text())) == 8
    assert not list(folder.glob("*.partial"))


def test_a_run_that_is_replaced_loses_its_results(painted_run):
    assert CocoEvaluation.results_name in run_folder.RESULTS
    folder = Path(shutil.copytree(painted_run, "run", symlinks=True))
    (folder / "detections.json").write_text("[]")

    run_folder.clear_run(folder)

    assert not (folder / "detections.json").exists()


def test_a_recipe_with_a_checkpoint_writes_only_what_is_named(painted_run, capsys):
    recipe, checkpoint = str(painted_run.parent / "painted.yaml"), f"load_path={painted_run / 'best.pt'}"

    evaluate(recipe, [checkpoint])
    assert "results     not written; --output FILE writes them" in capsys.readouterr().out
    assert not list(Path().iterdir())

    evaluate(recipe, [checkpoint], output="found.json")
    assert len(json.loads(Path("found.json").read_text())) == 8


def test_published_figures_stand_beside_them(painted_run, capsys):
    published = "published={BoxAP: 0.5, MaskAP: 0.25, MaskAP50: 0.75}"
    evaluate(str(painted_run), [published], output="found.json")
    printed = capsys.readouterr().out

    assert printed.splitlines()[0].split() == ["box", "mask", "published", "box", "published", "mask"]
    rows = table_of(printed)
    assert rows["AP"][2:] == ["0.5000", "0.2500"] and rows["AP50"][2:] == ["0.7500"] and len(rows["AR1"]) == 2


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("there.json", "is there already. Name another file"),
        ("no/found.json", "is to be in a folder that is not there"),
    ],
)
def test_an_output_that_cannot_be_is_refused(painted_run, output, reason):
    Path("there.json").write_text("mine")

    with pytest.raises(RecipeError, match=f"`--output` .*{output}.*{reason}"):
        evaluate(str(painted_run), output=output)

    assert Path("there.json").read_text() == "mine"


def test_a_classifier_has_no_results(finished_run):
    with pytest.raises(RecipeError, match="the metrics of this model write no results"):
        evaluate(str(finished_run), output="found.json")


def evaluated(labels: list[int], path: Path) -> CocoEvaluation:
    """An evaluation of one image with detections of these labels and no object."""
    evaluation = CocoEvaluation(masks=False)
    evaluation.begin_results(path, type("Data", (), {"category_ids": [5, 8]}))
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).repeat(len(labels), 1)
    prediction = {"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": torch.ones(len(labels))}
    target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "image_id": 3}
    evaluation.update([prediction], [target])
    return evaluation


def test_no_detections_are_an_empty_list():
    said = evaluated([], Path("found.json")).write_results()

    assert json.loads(Path("found.json").read_text()) == [] and said == "0 detections in 1 images"


def test_detections_of_a_label_without_a_category_are_left_out_and_counted():
    said = evaluated([2, 3, 1], Path("found.json")).write_results()

    # left, top, width and height of the box from (1, 2) to (4, 8)
    assert json.loads(Path("found.json").read_text()) == [
        {"image_id": 3, "category_id": category, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 1.0} for category in (8, 5)
    ]
    assert said == "2 detections in 1 images, 1 of unknown classes left out"


def test_data_without_category_ids_are_refused():
    with pytest.raises(ValueError, match="no `category_ids`"):
        CocoEvaluation(masks=False).begin_results(Path("found.json"), object())
