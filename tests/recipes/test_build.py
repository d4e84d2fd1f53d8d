from typing import Any

import pytest
import torch
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler

from ws_algorithm import WeightStandardization
from ws_algorithm.recipes import build, registry
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError


def built_optimizer(*overrides: str) -> torch.optim.Optimizer:
    recipe = resolve_recipe("quickstart", overrides)
    return build.build_optimizer(recipe, build.build_model(recipe))


@pytest.mark.parametrize(
    ("names", "base", "some"),
    [
        (registry.OPTIMIZERS, torch.optim.Optimizer, ["SGD", "AdamW", "DecoupledSGDW"]),
        (registry.SCHEDULERS, ComposerScheduler, ["MultiStepScheduler", "ConstantScheduler"]),
        (registry.ALGORITHMS, Algorithm, ["EMA", "LabelSmoothing", "WeightStandardization"]),
        (registry.CALLBACKS, Callback, ["LRMonitor", "EarlyStopper"]),
        (registry.LOGGERS, LoggerDestination, ["FileLogger", "WandBLogger"]),
    ],
)
def test_names_are_concrete_classes(names, base, some):
    assert set(some) <= names.keys()
    assert all(
        isinstance(member, type) and issubclass(member, base) and member is not base for member in names.values()
    )


def test_weight_standardization_is_ours():
    assert registry.ALGORITHMS["WeightStandardization"] is WeightStandardization


def test_blocks_become_what_they_name():
    recipe = resolve_recipe(
        "quickstart",
        [
            "algorithms={WeightStandardization: {n_last_layers_ignore: '1', formula: paper}, LabelSmoothing: {}}",
            "callbacks={SpeedMonitor: {window_size: '3'}}",
            "loggers={FileLogger: {}, InMemoryLogger: {}}",
        ],
    )

    standardization, other = build.build_algorithms(recipe)
    assert repr(standardization) == repr(WeightStandardization(1, formula="paper"))
    assert type(other) is registry.ALGORITHMS["LabelSmoothing"]
    assert [type(callback).__name__ for callback in build.build_callbacks(recipe)] == ["SpeedMonitor"]
    assert [type(logger).__name__ for logger in build.build_loggers(recipe)] == ["FileLogger", "InMemoryLogger"]
    assert type(build.build_scheduler(recipe)).__name__ == "CosineAnnealingWithWarmupScheduler"


def test_blocks_that_are_not_given_are_empty():
    recipe = resolve_recipe(
        "quickstart", [f"{key}=null" for key in ("algorithms", "callbacks", "loggers", "schedulers")]
    )

    assert build.build_algorithms(recipe) == build.build_callbacks(recipe) == build.build_loggers(recipe) == []
    assert build.build_scheduler(recipe) is None
    assert build.build_data("quickstart", Recipe(eval_dataloader=None), "eval_dataloader", training=False) is None


def test_a_group_without_parameters_is_left_out():
    # quickstart has nine convolutions and norms of two parameters each, and a weight and a bias in the head
    assert [len(group["params"]) for group in built_optimizer().param_groups] == [9 + 2 * 9 + 2]
    assert [
        len(group["params"]) for group in built_optimizer("optimizers.param_groups=[{params: '*'}]").param_groups
    ] == [9 + 2 * 9 + 2]


def test_options_of_groups_go_before_those_of_the_optimizer():
    optimizer = built_optimizer(
        "optimizers.param_groups=[{params: [norm, bias], weight_decay: 0}, {params: fc.*, lr: 1}]"
    )

    # the bias of the head is in the first group
    found = [(len(group["params"]), group["weight_decay"], group["lr"]) for group in optimizer.param_groups]
    assert found == [(2 * 9 + 1, 0, 0.05), (1, 5e-4, 1), (9, 5e-4, 0.05)]


def test_options_of_groups_are_converted_as_those_of_the_optimizer_are():
    optimizer = built_optimizer("optimizers.lr='1e-2'", "optimizers.param_groups=[{params: bias, lr: '1e-3'}]")

    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]


def test_a_batch_larger_than_the_data_is_a_mistake():
    recipe = resolve_recipe("quickstart", ["global_train_batch_size=1438", "device_train_microbatch_size=null"])

    with pytest.raises(RecipeError, match=r"`train_dataloader`: `global_train_batch_size` \(=1438\) is larger"):
        build.build_data("quickstart", recipe, "train_dataloader", training=True)


def test_evaluation_takes_its_own_batch_size_if_it_has_one():
    for size, expected in (("100", 100), ("null", 16)):
        recipe = resolve_recipe("quickstart", [f"global_eval_batch_size={size}"])
        spec = build.build_data("quickstart", recipe, "eval_dataloader", training=False)
        assert spec is not None and len(next(iter(spec.dataloader))[1]) == expected


@pytest.mark.parametrize(("wanted", "during"), [(3, 3), (None, 2)])
def test_threads_are_those_of_the_recipe_while_it_runs(wanted, during):
    outside = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), build.cpu_threads(Recipe(num_threads=wanted)):
            assert torch.get_num_threads() == during
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(outside)


def first_labels(seed: int) -> list[int]:
    recipe = resolve_recipe("quickstart", [f"seed={seed}"])
    spec = build.build_data("quickstart", recipe, "train_dataloader", training=True)
    assert spec is not None
    return next(iter(spec.dataloader))[1].tolist()


def test_the_seed_of_the_recipe_decides_the_order_of_images():
    assert first_labels(0) == first_labels(0) != first_labels(1)


def test_a_device_gets_its_share_of_a_batch(monkeypatch):
    monkeypatch.setattr(build.dist, "get_world_size", lambda: 2)
    recipe = resolve_recipe("quickstart")

    spec = build.build_data("quickstart", recipe, "train_dataloader", training=True)

    assert spec is not None and len(next(iter(spec.dataloader))[1]) == 16 // 2


def told_of_data(caplog: Any, source: str, *overrides: str, key: str = "train_dataloader") -> tuple[str, str]:
    """Whether the classes of the data are an error or a warning, and the line."""
    recipe = resolve_recipe(source, ["root=synthetic", *overrides])
    caplog.clear()
    try:
        build.build_data(source, recipe, key, training=key == "train_dataloader")
    except RecipeError as error:
        (mistake,) = error.errors
        return "error", mistake
    (record,) = caplog.records
    return record.levelname.lower(), record.getMessage()


@pytest.mark.parametrize("key", ["train_dataloader", "eval_dataloader"])
@pytest.mark.parametrize(("outputs", "level", "how"), [(7, "error", "less"), (12, "warning", "more")])
def test_data_of_more_classes_than_the_model_has_are_a_mistake_and_of_fewer_a_warning(outputs, level, how, key, caplog):
    told = told_of_data(caplog, "cifar10/resnet20_bn", f"model.num_classes={outputs}", key=key)

    line = f"`model.num_classes` (={outputs}) is {how} than the 10 of `{key}`. Set model.num_classes=10."
    assert told == (level, line)


@pytest.mark.parametrize(("outputs", "level", "how"), [(4, "error", "less"), (91, "warning", "more")])
def test_synthetic_objects_are_told_how_many_kinds_there_are(outputs, level, how, caplog):
    workers = [f"{key}_dataloader.num_workers=0" for key in ("train", "eval")]
    told = told_of_data(caplog, "coco/mask_rcnn_r50_gn_ws_2x", f"model.num_classes={outputs}", *workers)

    fix = f"train_dataloader.synthetic_num_classes={outputs - 1} eval_dataloader.synthetic_num_classes={outputs - 1}"
    line = f"`model.num_classes` (={outputs}) is {how} than the 81 of `train_dataloader`. Set {fix}, or "
    assert told == (level, line + "model.num_classes=81.")
    overrides = ["root=synthetic", f"model.num_classes={outputs}", *workers, *fix.split()]
    recipe = resolve_recipe("coco/mask_rcnn_r50_gn_ws_2x", overrides)
    for key in ("train_dataloader", "eval_dataloader"):
        spec = build.build_data("recipe", recipe, key, training=key == "train_dataloader")
        assert spec is not None and len(spec.dataloader.dataset.classes) == outputs - 1  # pyright: ignore


def test_the_number_of_classes_that_a_model_has_by_default_counts_too():
    recipe = resolve_recipe("imagenet/resnet50_gn_ws", ["root=synthetic"])
    del recipe.model["num_classes"]
    recipe.train_dataloader = {"name": "synthetic_images", "image_size": 8, "num_classes": 1005}

    with pytest.raises(RecipeError, match=r"`model.num_classes` \(=1000\) is less than the 1005 of"):
        build.build_data("recipe", recipe, "train_dataloader", training=True)


def test_what_is_frozen_without_weights_is_told():
    recipe = resolve_recipe("quickstart", ["freeze=[conv1]"])

    line = build.random_but_frozen(recipe, build.build_model(recipe)) or ""

    assert line.startswith("1 parameters, module.conv1.weight the first of them, do not train (`freeze`) and keep")
    assert "neither `model.pretrained` nor `load_path`" in line
    recipe = resolve_recipe("quickstart")
    assert build.random_but_frozen(recipe, build.build_model(recipe)) is None


def test_frozen_stages_are_named():
    recipe = resolve_recipe("coco/faster_rcnn_r50_gn_ws_1x")
    with torch.device("meta"):
        model = build.build_model(recipe)

    # the stem's convolution and norm; 3 blocks of 3 convolutions and norms, and a shortcut's: 3 + 3 * 9 + 3
    assert (build.random_but_frozen(recipe, model) or "").startswith(
        "33 parameters, module.backbone.body.conv1.weight the first of them, do not train (`model.frozen_stages`)"
    )
    recipe.model["pretrained"] = "weights.pth"
    assert build.random_but_frozen(recipe, model) is None


def test_a_group_that_others_have_left_nothing_is_a_mistake():
    with pytest.raises(RecipeError, match=r"`param_groups\[1\]\.params` .* selects only what groups before"):
        resolve_recipe(
            "quickstart",
            ["optimizers.param_groups=[{params: norm, weight_decay: 0}, {params: '*.bn1.weight', lr_factor: 3}]"],
        )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [("{num_groups: 7}", "`num_groups` (=7) must divide"), ("{include: bn9}", "`include` has 'bn9'")],
)
def test_group_normalization_is_tried_before_training(arguments, problem):
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", ["model.norm=batch", f"algorithms={{GroupNormalization: {arguments}}}"])

    (mistake,) = caught.value.errors
    assert mistake.startswith(f"`algorithms.GroupNormalization`: {problem}")
