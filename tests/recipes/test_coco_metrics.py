import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics import Metric

from ws_algorithm.recipes.best_checkpoint import default_monitor, monitorable
from ws_algorithm.recipes.coco_metrics import coco_metrics
from ws_algorithm.recipes.models.rcnn import build_faster_rcnn

from .small_coco_evaluation import (
    FIGURES,
    SIZE,
    Item,
    detections_for,
    figures,
    official_figures,
    targets_of,
    write_annotations,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> COCO:
    path = tmp_path_factory.mktemp("coco") / "annotations.json"
    write_annotations(path)
    return COCO(str(path))


def update(metrics: dict[str, Metric], detections: list[Item], targets: list[Item]) -> None:
    for metric in metrics.values():
        metric.update(detections, targets)


def found(detections: list[Item], targets: list[Item], *, masks: bool = True, batch: int = 2) -> dict[str, float]:
    metrics = coco_metrics(masks=masks)
    for start in range(0, len(targets), batch):
        update(metrics, detections[start : start + batch], targets[start : start + batch])
    return figures(metrics)


def item(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Item:
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(corners), SIZE, SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    result = {"boxes": corners, "labels": torch.tensor(labels).long(), "masks": masks}
    return result if scores is None else result | {"scores": torch.tensor(scores)}


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_figures_are_those_of_cocos_program(coco, batch):
    targets = targets_of(coco)
    assert sum(int(target["iscrowd"].sum()) for target in targets) == 2
    detections = detections_for(targets)

    expected = official_figures(coco, detections)

    assert found(detections, targets, batch=batch) == pytest.approx(expected, abs=1e-7)  # results are float32
    assert all(0.05 < value < 0.95 for value in expected.values())
    assert expected["BoxAP"] != expected["MaskAP"]


@pytest.mark.parametrize("masks", [True, False])
def test_an_area_of_0_is_that_of_a_small_object(coco, masks):
    changed = copy.deepcopy(coco)
    for entry in changed.dataset["annotations"][::3]:
        entry["area"] = 0
    changed.createIndex()
    targets = targets_of(changed)
    detections = detections_for(targets)
    expected = official_figures(changed, detections)
    assert expected["BoxAPs"] != official_figures(coco, detections)["BoxAPs"]

    expected = {name: value for name, value in expected.items() if masks or name.startswith("Box")}
    assert found(detections, targets, masks=masks) == pytest.approx(expected, abs=1e-7)


def test_boxes_alone(coco):
    targets = targets_of(coco)
    detections = detections_for(targets)
    expected = {name: value for name, value in official_figures(coco, detections).items() if name.startswith("Box")}
    for own in (*detections, *targets):
        del own["masks"]

    assert found(detections, targets, masks=False) == pytest.approx(expected, abs=1e-7)


def test_the_truth_as_detections_is_perfect(coco):
    targets = targets_of(coco)
    truth = []
    for target in targets:
        kept = target["iscrowd"] == 0
        own = {key: target[key][kept] for key in ("boxes", "labels")}
        truth.append(own | {"scores": torch.ones(int(kept.sum())), "masks": target["masks"][kept][:, None].float()})

    assert found(truth, targets) == {f"{kind}{figure}": 1.0 for kind in ("Box", "Mask") for figure in FIGURES}


def test_a_threshold_is_its_number_and_not_its_float32():
    # six of ten objects are found before a wrong detection, the others after it. Precision is 1 up to the recall of
    # 0.6, at 61 of 101 places, and 10 / 11 from there on. In float32, 0.6 is more than 0.6
    boxes = [[x * 15.0, 0.0, x * 15.0 + 10.0, 10.0] for x in range(10)]
    wrong = [0.0, 100.0, 10.0, 110.0]
    detection = item([*boxes[:6], wrong, *boxes[6:]], [1] * 11, [0.9] * 6 + [0.5] + [0.4] * 4)

    values = found([detection], [item(boxes, [1] * 10)])

    expected = (61 * 1 + 40 * (10 / 11)) / 101
    assert values["BoxAP"] == values["MaskAP"] == pytest.approx(expected, abs=1e-7)


def test_masks_are_what_reaches_a_half():
    target = item([[0, 0, 40, 40]], [1])
    values = torch.zeros(1, 1, SIZE, SIZE)
    values[..., :40, :40], values[..., 40:80, :40] = 0.5, 0.499

    detection = item([[0, 0, 40, 40]], [1], [0.9]) | {"masks": values}

    assert found([detection], [target])["MaskAP"] == 1.0


def test_a_detection_in_an_image_without_objects_is_wrong():
    target, empty = item([[0, 0, 40, 40]], [1]), item([], [])
    right, wrong = item([[0, 0, 40, 40]], [1], [0.5]), item([[0, 0, 40, 40]], [1], [0.9])

    values = found([right, wrong], [target, empty])

    assert values["BoxAP"] == values["MaskAP"] == 0.5  # one of two is right by the time that the object is found


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    target = item([[0, 0, 20, 20], [50, 50, 150, 150]], [1, 1]) | {"iscrowd": torch.tensor([0, 1])}
    in_the_crowd = item([[60, 60, 80, 80], [100, 100, 120, 120], [0, 0, 20, 20]], [1, 1, 1], [0.9, 0.8, 0.7])

    assert found([in_the_crowd], [target])["BoxAP"] == 1.0
    assert found([in_the_crowd], [target | {"iscrowd": torch.tensor([0, 0])}])["BoxAP"] < 0.5


def test_sizes_without_an_object_have_minus_one():
    small = item([[0, 0, 20, 20]], [1])

    values = found([item([[0, 0, 20, 20]], [1], [0.9])], [small])

    assert {name: value for name, value in values.items() if value != 1} == {
        f"{kind}{size}": -1.0 for kind in ("Box", "Mask") for size in ("APm", "APl")
    }


def test_the_area_of_a_target_says_its_size():
    target = item([[0, 0, 50, 50]], [1]) | {"area": torch.tensor([1000.0])}  # small: below 32 x 32

    values = found([item([[0, 0, 50, 50]], [1], [0.9])], [target])

    assert (values["BoxAPs"], values["BoxAPm"]) == (values["MaskAPs"], values["MaskAPm"]) == (1.0, -1.0)


def test_cocos_program_runs_once_for_all_metrics(monkeypatch):
    calls: list[Any] = []
    evaluate = COCOeval.evaluate
    monkeypatch.setattr(COCOeval, "evaluate", lambda self: (calls.append(self.params.iouType), evaluate(self)))
    target = item([[0, 0, 20, 20]], [1])

    metrics = copy.deepcopy(coco_metrics(masks=True))  # as the Trainer does
    for _ in range(3):
        update(metrics, [item([[0, 0, 20, 20]], [1], [0.9])], [target])
    figures(metrics)
    figures(metrics)

    assert calls == ["bbox", "segm"]
    evaluations = {id(metric.evaluation) for metric in metrics.values()}  # pyright: ignore
    assert len(metrics) == 12 and len(evaluations) == 1


@pytest.mark.parametrize("names", [["MaskAP"], ["BoxAPs", "MaskAP50"]])
def test_some_of_the_metrics(names):
    metrics = {name: metric for name, metric in coco_metrics(masks=True).items() if name in names}
    target, right = item([[0, 0, 20, 20]], [1]), item([[0, 0, 20, 20]], [1], [0.5])
    for _ in range(2):  # rounds
        for metric in metrics.values():
            metric.reset()
        update(metrics, [right], [target])
        update(metrics, [item([[0, 0, 20, 20]], [1], [0.9])], [item([], [])])

        assert figures(metrics) == dict.fromkeys(names, 0.5)


@pytest.mark.parametrize("one_after_the_other", [False, True])
def test_reset_forgets_what_was_seen(one_after_the_other):
    metrics = coco_metrics(masks=False)
    target, right = item([[0, 0, 20, 20]], [1]), item([[0, 0, 20, 20]], [1], [0.5])
    wrong = item([[80, 80, 99, 99]], [1], [0.5])
    update(metrics, [wrong], [target])
    assert figures(metrics)["BoxAP"] == 0

    for metric in metrics.values():
        metric.reset()
        if one_after_the_other:
            metric.update([right], [target])
    if not one_after_the_other:
        update(metrics, [right], [target])

    assert figures(metrics)["BoxAP"] == 1


def test_metrics_that_are_not_in_step():
    first, second = list(coco_metrics(masks=False).values())[-2:]
    target, right = item([[0, 0, 20, 20]], [1]), item([[0, 0, 20, 20]], [1], [0.5])
    wrong, empty = item([[0, 0, 20, 20]], [1], [0.9]), item([], [])
    for metric in (first, second):
        metric.update([wrong], [target])

    first.reset()
    first.update([right], [target])
    second.reset()  # keeps what the first has seen since
    first.update([wrong], [empty])
    second.update([right], [target])
    second.update([wrong], [empty])

    assert second.compute() == 0.5  # of two detections, the second


def test_figures_go_on_after_they_were_computed():
    metrics = coco_metrics(masks=False)
    target, right = item([[0, 0, 20, 20]], [1]), item([[0, 0, 20, 20]], [1], [0.5])
    update(metrics, [right], [target])
    assert figures(metrics)["BoxAP"] == 1

    update(metrics, [item([[0, 0, 20, 20]], [1], [0.9])], [item([], [])])

    assert figures(metrics)["BoxAP"] == 0.5


def test_higher_is_better_and_a_run_keeps_the_weights_of_the_best_plain_average():
    for masks, expected in ((False, "BoxAP"), (True, "MaskAP")):
        metrics = coco_metrics(masks=masks)

        assert all(metric.higher_is_better for metric in metrics.values())
        assert monitorable(metrics) == list(metrics)
        model: Any = SimpleNamespace(get_metrics=lambda is_train, metrics=metrics: metrics)
        assert default_monitor(model) == expected


def test_a_batch_has_no_figures_of_its_own():
    target, right = item([[0, 0, 20, 20]], [1]), item([[0, 0, 20, 20]], [1], [0.5])

    with pytest.raises(NotImplementedError, match="call `update` and `compute`"):
        coco_metrics(masks=False)["BoxAP"]([right], [target])


def test_without_pycocotools_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)

    with torch.device("meta"), pytest.raises(ValueError, match=r'pip install "ws-algorithm\[detection\]"'):
        build_faster_rcnn("resnet50")


def test_two_processes_compute_the_figures_of_all_images(tmp_path, coco):
    write_annotations(tmp_path / "annotations.json")
    shares = [("024", "13"), ("01234", ""), ("1", "2340")]  # of five images, one after the other
    program, checkout = Path(__file__).with_name("small_coco_evaluation.py"), Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen([sys.executable, str(program), str(tmp_path), str(rank), *cases], env=environment)
        for rank, cases in enumerate(zip(*shares, strict=True))
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]

    targets = targets_of(coco)
    detections = detections_for(targets)
    official, turns = official_figures(coco, detections), [1, 2, 3, 4, 0]  # how the two share the last case
    in_turns = found([detections[image] for image in turns], [targets[image] for image in turns])
    expected = [pytest.approx(values, abs=1e-7) for values in (official, official, in_turns)]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
