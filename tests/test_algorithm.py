"""The algorithm in Composer's ``Trainer``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Event, State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger, LoggerDestination
from composer.models import ComposerClassifier
from gain_and_shift import gain_and_shift
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ws_algorithm import FORMULAS, Formula, WeightStandardization, is_weight_standardized, standardize_weight
from ws_algorithm.parametrization import raw_weight

OWN_FORMULA = Formula(eps=1e-3, eps_inside_root=True, unbiased=True)


class Hyperparameters(LoggerDestination):
    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        self.logged.update(hyperparameters)


def classifier() -> Any:
    block = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()]
    return ComposerClassifier(
        nn.Sequential(*block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), num_classes=2
    )


def convolutions(trainer: Trainer) -> tuple[Any, Any]:
    network: Any = trainer.state.model.module
    return network[0], network[3]


def train(algorithms: Any, **arguments: Any) -> Trainer:
    """Four steps on 8 images, the same for every call."""
    torch.manual_seed(3)
    images = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2)
    model = arguments.pop("model", None) or classifier()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(images, batch_size=4),
        max_duration="2ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=algorithms,
        device="cpu",
        seed=3,
        progress_bar=False,
        **arguments,
    )
    return trainer


def test_it_runs_on_init_only():
    algorithm = WeightStandardization()
    state = State(model=classifier(), rank_zero_seed=0, run_name="run", device=DeviceCPU())

    assert [event for event in Event if algorithm.match(event, state)] == [Event.INIT]


@pytest.mark.parametrize("n, count", [(0, 2), (1, 1), (5, 0)])
def test_it_logs_the_number_of_standardized_convolutions(n, count):
    state = State(model=classifier(), rank_zero_seed=0, run_name="run", device=DeviceCPU())
    destination = Hyperparameters()

    WeightStandardization(n).apply(Event.INIT, state, Logger(state, destinations=[destination]))

    assert destination.logged == {"WeightStandardization/num_weights_standardized": count}


@pytest.mark.parametrize(
    "algorithm",
    [
        WeightStandardization(),
        WeightStandardization(3),
        WeightStandardization(n_last_layers_ignore=1, formula="paper"),
        WeightStandardization(formula=OWN_FORMULA),
        WeightStandardization(layers="normalized", include="module.*", exclude=["module.0", "module.1.*"]),
    ],
    ids=repr,
)
def test_the_repr_evaluates(algorithm):
    again = eval(repr(algorithm))

    assert type(again) is WeightStandardization
    assert vars(again) == vars(algorithm)
    assert repr(again) == repr(algorithm)


def test_the_repr_of_the_default():
    assert repr(WeightStandardization()) == (
        "WeightStandardization(n_last_layers_ignore=0, layers='all', include=None, exclude=None, formula='composer', "
        "once_per_step=True)"
    )


def test_it_is_required_on_load():
    assert WeightStandardization.required_on_load() is True


@pytest.mark.parametrize("n", [-1, True, 1.5, None, "1", float("nan")], ids=repr)
def test_the_constructor_refuses_bad_counts(n):
    with pytest.raises(ValueError, match="`n_last_layers_ignore`"):
        WeightStandardization(n)


@pytest.mark.parametrize("formula", ["Composer", None, 1e-5], ids=repr)
def test_the_constructor_refuses_bad_formulas(formula):
    with pytest.raises(ValueError, match="`formula`"):
        WeightStandardization(formula=formula)


@pytest.mark.parametrize("formula", [*FORMULAS, OWN_FORMULA], ids=str)
def test_a_run_trains_the_raw_weights(formula):
    model = classifier()
    raw = [model.module[0].weight, model.module[3].weight]
    before = [weight.detach().clone() for weight in raw]
    memory = InMemoryLogger()
    trainer = train(WeightStandardization(formula=formula), model=model, loggers=memory)

    trainer.fit()

    for conv, weight, start in zip(convolutions(trainer), raw, before, strict=True):
        assert raw_weight(conv) is weight
        assert not torch.equal(weight, start)
        assert torch.equal(conv.weight, standardize_weight(weight, formula, **gain_and_shift(conv)))
    assert memory.hyperparameters["WeightStandardization/num_weights_standardized"] == 2
    assert trainer.state.timestamp.batch == 4


def test_twice_equals_once():
    once, twice = train(WeightStandardization()), train([WeightStandardization(), WeightStandardization()])

    once.fit()
    twice.fit()

    expected, actual = once.state.model.state_dict(), twice.state.model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert all(len(conv.parametrizations["weight"]) == 1 for conv in convolutions(twice))


def test_a_checkpoint_resumes_to_the_same_weights(tmp_path: Path):
    whole = train(
        WeightStandardization(1), save_folder=str(tmp_path), save_interval="1ep", save_filename="ep{epoch}.pt"
    )
    whole.fit()

    resumed = train(WeightStandardization(1), load_path=str(tmp_path / "ep1.pt"))
    assert resumed.state.timestamp.batch == 2
    resumed.fit()

    expected, actual = whole.state.model.state_dict(), resumed.state.model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert [is_weight_standardized(conv) for conv in convolutions(resumed)] == [True, False]


def test_a_plain_checkpoint_arrives_in_the_raw_weights(tmp_path: Path):
    plain = train(None, save_folder=str(tmp_path), save_filename="plain.pt")
    plain.fit()

    trainer = train(
        WeightStandardization(),
        load_path=str(tmp_path / "plain.pt"),
        load_weights_only=True,
        load_strict_model_weights=True,
    )

    for conv, trained in zip(convolutions(trainer), convolutions(plain), strict=True):
        assert torch.equal(raw_weight(conv), trained.weight)
        assert torch.equal(conv.weight, standardize_weight(trained.weight))
        assert torch.equal(conv.bias, trained.bias)
    trainer.fit()


def test_a_checkpoint_with_it_does_not_load_silently_without_it(tmp_path: Path):
    train(WeightStandardization(), save_folder=str(tmp_path), save_filename="ws.pt").fit()

    with pytest.raises(Exception, match="module.0"):
        train(None, load_path=str(tmp_path / "ws.pt"))
