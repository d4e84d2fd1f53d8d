"""Checkpoints of other runs in a Trainer: of another formula, and of a plain model."""

from pathlib import Path
from typing import Any

import composer.algorithms
import pytest
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ws_algorithm import Formula, WeightStandardization
from ws_algorithm.checkpoints.run_formulas import recorded_formulas
from ws_algorithm.parametrization import raw_weight

OWN = Formula(eps=1e-3, eps_inside_root=True, unbiased=True)
# Composer says so of each algorithm that the checkpoint does not know
NEW_TO_IT = pytest.mark.filterwarnings("ignore:WeightStandardization is not in the state_dict:UserWarning")
IGNORED = {"load_weights_only": True, "load_ignore_keys": ["state/algorithms*"]}


def trainer_with(algorithms: Any, optimizer: Any = None, **arguments: Any) -> Trainer:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = ComposerClassifier(nn.Sequential(*layers, nn.Linear(4, 2)), num_classes=2)
    images = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)
    return Trainer(
        model=model,
        train_dataloader=DataLoader(images, batch_size=4),
        max_duration="2ep",
        optimizers=optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=algorithms,
        device="cpu",
        progress_bar=False,
        **arguments,
    )


def checkpoint_of(algorithms: Any, folder: Path, **arguments: Any) -> str:
    trainer_with(algorithms, save_folder=str(folder), save_filename="ep{epoch}.pt", **arguments).fit(duration="1ep")
    return str(folder / "ep1.pt")


@pytest.fixture(scope="module")
def of_composer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint_of(WeightStandardization(), tmp_path_factory.mktemp("composer"))


@pytest.fixture(scope="module")
def of_plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint_of(None, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("formula", ["paper", "affine", "scaled", OWN], ids=str)
def test_a_checkpoint_of_another_formula_is_refused(formula, weights_only, of_composer):
    algorithm = WeightStandardization(formula=formula)

    with pytest.raises(ValueError, match=r"`formula` \(=.*trained, 'composer'") as caught:
        trainer_with(algorithm, load_path=of_composer, load_weights_only=weights_only)

    assert f"(={formula!r})" in str(caught.value)


@pytest.mark.parametrize("formula", ["composer", "bit", Formula(eps=1e-10, eps_inside_root=True, unbiased=False)])
def test_the_same_formula_may_have_another_name(formula, of_composer):
    trainer = trainer_with(WeightStandardization(formula=formula), load_path=of_composer)

    assert trainer.state.timestamp.batch == 2


def test_a_formula_of_ones_own_is_read_from_the_checkpoint(tmp_path):
    checkpoint = checkpoint_of(WeightStandardization(formula=OWN), tmp_path)

    assert trainer_with(WeightStandardization(formula=OWN), load_path=checkpoint).state.timestamp.batch == 2
    with pytest.raises(ValueError, match=r"`formula` \(='composer'\).*trained, Formula\(eps=0\.001"):
        trainer_with(WeightStandardization(), load_path=checkpoint)


def test_raw_weights_can_be_taken_all_the_same(of_composer):
    trainer = trainer_with(WeightStandardization(formula="paper"), load_path=of_composer, **IGNORED)

    (weight,) = [value for value in kept_in(of_composer)["model"].values() if value.ndim == 4]
    assert torch.equal(raw_weight(convolution(trainer)), weight)


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        (None, []),
        ([("EMA", {"repr": "EMA()"})], []),
        ([("WeightStandardization", {"repr": repr(composer.algorithms.WeightStandardization())})], [None]),
        ([("EMA", {}), ("WeightStandardization", {"repr": repr(WeightStandardization(formula="timm"))})], ["timm"]),
        ([("WeightStandardization", {"repr": repr(WeightStandardization(include="formula='x'"))})], ["composer"]),
        ([("WeightStandardization", {"repr": "WeightStandardization(formula=Own(1))"})], ["Own(1)"]),
        ([("WeightStandardization", {"repr": "WeightStandardization(formula=<a>)"})], [None]),
    ],
)
def test_formulas_are_read_from_what_composer_keeps(algorithms, expected):
    assert recorded_formulas(algorithms) == expected


def in_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p for p in model.parameters() if (p.ndim == 4) is of_conv]} for of_conv in (False, True)]
    return torch.optim.SGD([groups[0], groups[1] | {"weight_decay": 0.1}], lr=0.1, momentum=0.9)


@NEW_TO_IT
@pytest.mark.parametrize(("formula", "optimizer"), [("paper", None), ("paper", in_two_groups), ("affine", None)])
def test_a_plain_run_continues_with_the_state_of_its_optimizer(formula, optimizer, tmp_path):
    of_plain = checkpoint_of(None, tmp_path, optimizer=optimizer)

    trainer = trainer_with(WeightStandardization(formula=formula), optimizer, load_path=of_plain)

    kept = kept_in(of_plain)
    name = "module.0.weight"
    raw = raw_weight(convolution(trainer))
    assert torch.equal(raw, kept["model"][name])
    momentum = trainer.state.optimizers[0].state[raw]["momentum_buffer"]
    assert momentum.any() and torch.equal(momentum, kept["optimizers"]["SGD"]["state"][name]["momentum_buffer"])
    assert trainer.state.timestamp.batch == 2
    trainer.fit()
    assert trainer.state.timestamp.batch == 4


@NEW_TO_IT
def test_gains_that_are_new_to_the_optimizer_are_named(of_plain):
    with pytest.raises(ValueError, match=r"no state of 'module\.0\.parametrizations.*gain'.*load_weights_only=true"):
        trainer_with(WeightStandardization(formula="scaled"), load_path=of_plain)


def convolution(trainer: Trainer) -> nn.Module:
    (found,) = [layer for layer in trainer.state.model.modules() if isinstance(layer, nn.Conv2d)]
    return found


def kept_in(checkpoint: str) -> dict[str, Any]:
    return torch.load(checkpoint, weights_only=False)["state"]
