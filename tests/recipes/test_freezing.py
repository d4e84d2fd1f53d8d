from pathlib import Path
from typing import Any

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn

from ws_algorithm import apply_weight_standardization
from ws_algorithm.recipes.freezing import freeze, mistakes_in
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW, load_weights


def network() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), block, nn.Linear(4, 2))


ALL = ["0.weight", "1.weight", "1.bias", "2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias", "3.weight", "3.bias"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["0"], ["0.weight"]),
        (["2"], ["2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"]),
        (["2.1"], ["2.1.weight", "2.1.bias"]),
        (["2.0.bias"], ["2.0.bias"]),
        (["[01]"], ["0.weight", "1.weight", "1.bias"]),
        (["*.bias", "0"], ["0.weight", "1.bias", "2.0.bias", "2.1.bias", "3.bias"]),
        ([], []),
    ],
)
@pytest.mark.parametrize("standardized", [False, True])
def test_patterns_and_names_select_parameters(patterns, expected, standardized):
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if standardized:
        apply_weight_standardization(model, layers="normalized")

    freeze(model, patterns)

    assert [names[id(p)] for p in model.parameters() if not p.requires_grad] == [
        names[id(p)] for p in model.parameters() if names[id(p)] in expected
    ]


def test_names_are_those_of_the_module_inside_a_composer_model():
    model = ComposerClassifier(network(), num_classes=2)

    freeze(model, ["2.1"])

    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["module.2.1.weight", "module.2.1.bias"]


@pytest.mark.parametrize(
    ("patterns", "mistakes"),
    [
        (["0", "2.11"], ["`freeze[1]` (='2.11') selects no parameter. Did you mean `2.1`?"]),
        (["module.3"], ["`freeze[0]` (='module.3') selects no parameter. Did you mean `3`?"]),
        (["zz"], ["`freeze[0]` (='zz') selects no parameter. Choose from: 0, 1, 2, 3, or what is in them."]),
        (["*"], ["`freeze` (=['*']) leaves no parameter to train: all 9 are frozen."]),
        (["x", "[0-3]"], ["`freeze[0]`", "`freeze` (=['x', '[0-3]']) leaves no parameter to train"]),
    ],
)
def test_mistakes_change_nothing(patterns, mistakes):
    model = network()

    found = mistakes_in(model, patterns)

    assert len(found) == len(mistakes)
    assert all(line.startswith(beginning) for line, beginning in zip(found, mistakes, strict=True))
    with pytest.raises(ValueError) as caught:
        freeze(model, patterns)
    assert str(caught.value) == " ".join(found)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "mistakes"),
    [
        (["freeze=[layr1]"], ["`freeze[0]` (='layr1') selects no parameter. Did you mean `layer1`?"]),
        (["freeze=['*']"], ["`freeze` (=['*']) leaves no parameter to train"]),
        (["freeze=layer1"], ["`freeze` (='layer1')"]),
        (["freeze=[layr1]", "optimizers.lr=-1"], ["`freeze[0]`", "`optimizers`: Invalid learning rate"]),
        (
            ["freeze=[fc]", "optimizers.param_groups=[{params: fc.*}]"],
            ["`optimizers`: `param_groups[0].params` selects nothing with 'fc.*': all of it is frozen."],
        ),
    ],
)
def test_a_recipe_is_checked_before_it_runs(overrides, mistakes):
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", overrides)

    assert len(caught.value.errors) == len(mistakes)
    assert all(line.startswith(text) for line, text in zip(caught.value.errors, mistakes, strict=True))


def test_frozen_convolutions_are_standardized_and_stay():
    two_steps = ["freeze=[conv1, layer1]", *FEW, "train_subset_num_batches=2", "schedulers=null"]
    train("quickstart", [*two_steps, "optimizers={name: SGD, lr: 0}", "save_folder=still"])
    network: Any = train("quickstart", [*two_steps, "save_folder=run"]).state.model.module

    before, after = load_weights(Path("still/latest-rank0.pt")), load_weights(Path("run/latest-rank0.pt"))
    frozen = {name for name in after if name.startswith(("module.conv1.", "module.layer1."))}
    # a stem and a block of two convolutions and their norms of two parameters
    assert len(frozen) == 3 + 2 * 2 and len(after) == 9 + 2 * 9 + 2
    assert {name for name in after if torch.equal(before[name], after[name])} == frozen
    for name in ("conv1", "layer1.0.conv1", "layer2.0.conv1"):
        conv = network.get_submodule(name)
        means = conv.weight.flatten(1).mean(1)
        torch.testing.assert_close(means, torch.zeros_like(means))
        assert conv.parametrizations.weight.original.requires_grad == (name == "layer2.0.conv1")


def test_the_optimizer_has_what_trains():
    trainer = train("quickstart", ["freeze=['layer[12]', conv1]", *FEW, "max_duration=1ba"])

    (optimizer,) = trainer.state.optimizers
    # layer3: three convolutions and norms; the head; and the norm behind the stem
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3 * 3 + 2 + 2
