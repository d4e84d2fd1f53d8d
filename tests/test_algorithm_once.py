"""The algorithm once per optimizer step: runs of the ``Trainer`` end in the weights of those without.

In float64, where twenty steps leave roundings of 1e-12 or so; a wrong gradient shows in the first digits.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import composer.algorithms
import pytest
import torch
from composer import Trainer
from composer.algorithms import EMA, SAM, SWA, GradientClipping
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ws_algorithm import WeightStandardization, fold_weight_standardization, standardize_weight
from ws_algorithm.parametrization import raw_weight

SEED = 11
TOLERANCE = 1e-9

pytestmark = [
    pytest.mark.filterwarnings("ignore:SAM has known issues:UserWarning"),
    pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning"),
]

Build = Callable[[], list[Algorithm]]


def classifier(dtype: torch.dtype = torch.float64) -> Any:
    """Convolutions ``module.0`` and ``module.3``; the same weights at every call."""
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()]
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    return ComposerClassifier(network.to(dtype), num_classes=2)


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(images.to(dtype), torch.arange(16) % 2)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def prepare(algorithms: Sequence[Algorithm], model: Any = None, optimizer: Any = sgd, **arguments: Any) -> Trainer:
    """A ``Trainer`` of twenty steps, each of four micro-batches of two images, or as many on each rank."""
    model = classifier() if model is None else model
    dataset = data(next(model.parameters()).dtype)
    loader = DataLoader(dataset, batch_size=8, sampler=dist.get_sampler(dataset, shuffle=False))
    return Trainer(
        model=model,
        train_dataloader=loader,
        algorithms=algorithms,
        optimizers=optimizer(model),
        **{
            "max_duration": "20ba",
            "device_train_microbatch_size": 2,
            "device": "cpu",
            "seed": SEED,
            "progress_bar": False,
            **arguments,
        },
    )


def run(algorithms: Sequence[Algorithm], *arguments: Any, **others: Any) -> Trainer:
    trainer = prepare(algorithms, *arguments, **others)
    trainer.fit()
    return trainer


def exact() -> WeightStandardization:
    return WeightStandardization(once_per_step=False)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_near(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance` of the largest entry of each tensor."""
    assert list(actual) == list(expected)
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max()
        assert difference <= tolerance * expected[name].abs().max(), name


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


OTHERS: dict[str, tuple[Any, Build]] = {
    "SGD": (sgd, lambda: []),
    "Adam": (adam, lambda: []),
    "clip norm": (sgd, lambda: [GradientClipping("norm", 0.05)]),
    "clip value": (sgd, lambda: [GradientClipping("value", 0.005)]),
    "clip adaptively": (sgd, lambda: [GradientClipping("adaptive", 0.01)]),
    "SAM": (sgd, lambda: [SAM(rho=0.1)]),
    "SAM at times": (sgd, lambda: [SAM(rho=0.1, interval=3)]),
    "SAM, clip norm": (sgd, lambda: [SAM(rho=0.1), GradientClipping("norm", 0.05)]),
    "EMA": (sgd, lambda: [EMA(half_life="3ba")]),
    "SWA": (sgd, lambda: [SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba")]),
}


def outcome(trainer: Trainer) -> dict[str, Tensor]:
    """The weights, and their average if an algorithm keeps one beside them."""
    result = weights(trainer.state.model)
    for algorithm in trainer.state.algorithms:
        if isinstance(algorithm, EMA):
            assert algorithm.ema_model is not None
            averages = algorithm.ema_model.named_parameters_dict
            result.update({f"average of {name}": value.clone() for name, value in averages.items()})
    return result


@cache
def expected(name: str) -> dict[str, Tensor]:
    optimizer, others = OTHERS[name]
    return outcome(run([exact(), *others()], None, optimizer))


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_ends_in_the_same_weights(name, place):
    optimizer, build = OTHERS[name]
    others, ours = build(), [WeightStandardization()]

    trainer = run([*ours, *others] if place == "first" else [*others, *ours], None, optimizer)

    assert_near(outcome(trainer), expected(name))
    if name != "SGD":  # the other one does something
        plain, actual = expected("SGD"), outcome(trainer)
        raw = "module.0.parametrizations.weight.original"
        assert actual.keys() != plain.keys() or not torch.allclose(actual[raw], plain[raw], rtol=1e-4)


@pytest.mark.parametrize("formula", ["paper", "tensorflow", "timm", "bit"])
def test_a_run_by_formula(formula):
    once, plain = (
        run([WeightStandardization(formula=formula, once_per_step=once)], max_duration="6ba") for once in (True, False)
    )

    assert_near(outcome(once), outcome(plain))


def test_a_run_in_float32():
    once, plain = (
        run([WeightStandardization(once_per_step=once)], classifier(torch.float32), max_duration="10ba")
        for once in (True, False)
    )

    assert_near(outcome(once), outcome(plain), tolerance=1e-6)


@pytest.mark.parametrize("name", ["SGD", "clip norm", "SAM"])
def test_a_run_with_the_algorithm_of_composer(name):
    optimizer, others = OTHERS[name]

    theirs = weights(run([composer.algorithms.WeightStandardization(), *others()], None, optimizer).state.model)

    ours = expected(name)
    assert list(ours) == list(theirs)
    actual = outcome(run([WeightStandardization(), *others()], None, optimizer))
    assert_near(actual, theirs, tolerance=1e-5)


def test_two_of_them_equal_one():
    trainer = run([WeightStandardization(), GradientClipping("norm", 0.05), WeightStandardization()])

    assert_near(outcome(trainer), expected("clip norm"))


def test_it_is_the_default():
    assert WeightStandardization().once_per_step is True
    assert "once_per_step=True" in repr(WeightStandardization())
    assert "once_per_step=False" in repr(exact())


@pytest.mark.parametrize("value", [None, 1, "yes"], ids=repr)
def test_what_is_not_a_truth_value_is_refused(value):
    with pytest.raises(ValueError, match="`once_per_step`"):
        WeightStandardization(once_per_step=value)


class WeightsUsed(Callback):
    """The weights that the first convolution convolved with, by batch. Kept, so that no two are at one address."""

    def __init__(self) -> None:
        self.by_batch: dict[int, list[Tensor]] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        def remember(conv: Any, *_: Any) -> None:
            self.by_batch.setdefault(int(state.timestamp.batch), []).append(conv.weight)

        network: Any = state.model.module
        self.handle = network[0].register_forward_hook(remember)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.handle.remove()


@pytest.mark.parametrize("once, count", [(True, 1), (False, 4)])
def test_weights_are_computed_once_per_step(once, count):
    used = WeightsUsed()

    run([WeightStandardization(once_per_step=once)], callbacks=used, max_duration="3ba")

    assert list(used.by_batch) == [0, 1, 2]
    assert all(len(batch) == 4 for batch in used.by_batch.values())
    assert [len({weight.data_ptr() for weight in batch}) for batch in used.by_batch.values()] == [count] * 3


# Runs that stop

RAISING_EVENTS = ["before_forward", "after_forward", "in_backward", "after_backward"]


class Raises(Callback):
    """Raises `error` at the second micro-batch of the third batch, `times` times."""

    def __init__(self, event: str, error: Exception, times: int = 1) -> None:
        self.error, self.times, self.count = error, times, 0
        setattr(self, event, self._count)
        if event == "in_backward":
            self.after_loss = self._arm

    def _is_due(self, state: State) -> bool:
        if int(state.timestamp.batch) != 2 or self.times == 0:
            return False
        self.count += 1
        return self.count == 2

    def _count(self, state: State, logger: Logger) -> None:
        if self._is_due(state):
            self._fail()

    def _arm(self, state: State, logger: Logger) -> None:
        if self._is_due(state):
            loss: Any = state.loss
            loss.register_hook(self._fail)

    def _fail(self, *_: Any) -> None:
        self.times, self.count = self.times - 1, 0
        raise self.error


def stopped(algorithm: Algorithm, event: str) -> Trainer:
    trainer = prepare([algorithm], callbacks=Raises(event, ArithmeticError("stop")), max_duration="6ba")
    with pytest.raises(ArithmeticError, match="stop"):
        trainer.fit()
    assert trainer.state.timestamp.batch == 2
    return trainer


def by_hand(model: Any, forward: Callable[[Tensor], Tensor], zeroes: bool) -> dict[str, Tensor]:
    if zeroes:
        model.zero_grad()
    images = data().tensors[0]
    for batch in images.split(4):
        forward(batch).square().mean().backward()
    return gradients(model)


@pytest.mark.parametrize("through", ["model", "network", "layer"])
@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroed", "accumulated"])
@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_loop_by_hand_after_a_run_that_stopped(event, zeroes, through):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        model: Any = stopped(algorithm, event).state.model
        forwards: dict[str, Callable[[Tensor], Tensor]] = {
            "model": lambda batch, model=model: model((batch, None)),
            "network": model.module,
            "layer": lambda batch, model=model: model.module[3](batch[:, :1].expand(-1, 4, -1, -1)),
        }
        results.append((by_hand(model, forwards[through], zeroes), weights(model)))
        with torch.no_grad():
            assert torch.equal(model.module[0].weight, standardize_weight(raw_weight(model.module[0])))

    assert_near(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1])


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_step_by_hand_after_a_run_that_stopped(event):
    """The gradients of the micro-batches before belong to the step."""
    results = []
    for algorithm in (WeightStandardization(), exact()):
        trainer = stopped(algorithm, event)
        trainer.state.optimizers[0].step()
        results.append(weights(trainer.state.model))

    assert_near(*results)


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_run_that_stopped_goes_on(event):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        trainer = stopped(algorithm, event)
        trainer.fit()
        assert trainer.state.timestamp.batch == 6
        results.append(weights(trainer.state.model))

    assert_near(*results)


def test_the_steps_after_a_run_that_stopped_are_standardized_once_again():
    first, second = WeightsUsed(), WeightsUsed()
    trainer = stopped(WeightStandardization(), "after_forward")
    trainer.state.callbacks.append(first)
    trainer.fit()
    run([WeightStandardization()], trainer.state.model, callbacks=second, max_duration="3ba")

    for used in (first, second):
        assert {len({weight.data_ptr() for weight in batch}) for batch in used.by_batch.values()} == {1}


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_copy_of_a_model_whose_run_stopped(event):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        copied: Any = copy.deepcopy(stopped(algorithm, event).state.model)
        results.append(by_hand(copied, copied.module, zeroes=False))

    assert_near(*results)


@pytest.mark.filterwarnings("ignore:CUDA out of memory:RuntimeWarning")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_out_of_memory_with_smaller_micro_batches(event, times):
    """As on a GPU, where the Trainer tries the batch again with micro-batches of half the size."""
    results = []
    for algorithm in (WeightStandardization(), exact()):
        callback = Raises(event, RuntimeError("CUDA out of memory"), times)
        arguments: Any = {"callbacks": callback, "device_train_microbatch_size": 4, "max_duration": "5ba"}
        trainer = prepare([algorithm, GradientClipping("norm", 0.05)], **arguments)
        trainer.state.auto_microbatching = True
        trainer.fit()
        assert callback.times == 0 and trainer.state.device_train_microbatch_size == 4 // 2**times
        results.append(weights(trainer.state.model))

    assert_near(*results)


# Checkpoints, evaluation, fallback


def test_checkpoints(tmp_path: Path):
    def files(name: str) -> dict[str, Any]:
        files = {"save_folder": str(tmp_path / name), "save_filename": "ba{batch}.pt", "save_interval": "5ba"}
        return {**files, "max_duration": "8ba"}

    whole = run([WeightStandardization()], **files("once"))
    run([exact()], **files("exact"))

    once, plain = (
        torch.load(tmp_path / name / "ba5.pt", weights_only=False)["state"]["model"] for name in ("once", "exact")
    )
    assert_near(once, plain)
    for name in ("once", "exact"):
        for algorithm in (WeightStandardization(), exact()):
            resumed = prepare([algorithm], load_path=str(tmp_path / name / "ba5.pt"), max_duration="8ba")
            assert resumed.state.timestamp.batch == 5
            resumed.fit()
            assert_near(weights(resumed.state.model), weights(whole.state.model))


class EvaluatedLosses(Callback):
    """The loss of each evaluation, and what it must be: that of the model with its weights folded."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def eval_end(self, state: State, logger: Logger) -> None:
        folded: Any = copy.deepcopy(state.model)
        fold_weight_standardization(folded)
        images, labels = data().tensors
        with torch.no_grad():
            expected = nn.functional.cross_entropy(folded.module(images), labels)
        self.pairs.append((state.eval_metrics["eval"]["CrossEntropy"].compute().item(), expected.item()))


def test_evaluation_uses_the_weights_of_now():
    losses = EvaluatedLosses()
    evaluation: Any = {"eval_dataloader": DataLoader(data(), batch_size=4), "eval_interval": "2ba"}
    trainer = prepare([WeightStandardization()], callbacks=losses, max_duration="6ba", **evaluation)

    trainer.fit()
    trainer.eval()
    with torch.no_grad():
        network: Any = trainer.state.model.module
        raw_weight(network[0]).mul_(torch.linspace(-1, 1, 3))
    trainer.eval()
    trainer.fit(duration="4ba")
    trainer.eval()

    assert len(losses.pairs) == 3 + 1 + 1 + 2 + 1
    assert len({expected for _, expected in losses.pairs}) == 3 + 1 + 2
    for actual, expected in losses.pairs:
        assert actual == pytest.approx(expected, rel=1e-6)  # the metric is a float32


def test_a_copy_of_the_model_within_a_step():
    class Copies(Callback):
        def after_backward(self, state: State, logger: Logger) -> None:
            copied: Any = copy.deepcopy(state.model)
            by_hand(copied, copied.module, zeroes=True)

    trainer = run([WeightStandardization()], callbacks=Copies(), max_duration="6ba")

    assert_near(outcome(trainer), outcome(run([exact()], max_duration="6ba")))


def test_evaluation_within_a_step():
    """A callback that predicts between micro-batches changes nothing."""

    class Predicts(Callback):
        def after_backward(self, state: State, logger: Logger) -> None:
            with torch.no_grad():
                state.model(state.batch)

    trainer = run([WeightStandardization()], callbacks=Predicts())

    assert_near(outcome(trainer), expected("SGD"))


def test_a_compiled_model_is_standardized_exactly_and_one_line_says_so(caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO):
        trainer = run([WeightStandardization()], compile_config={"backend": "eager"}, max_duration="3ba")
    torch._dynamo.reset()

    records = [record for record in caplog.records if "once per step" in record.getMessage()]
    assert [record.name for record in records] == ["ws_algorithm.algorithm"]
    assert "compiled" in records[0].getMessage()
    assert_near(outcome(trainer), outcome(run([exact()], max_duration="3ba")))


def test_nothing_is_said_in_an_ordinary_run(caplog):
    with caplog.at_level(logging.INFO):
        run([WeightStandardization(), GradientClipping("norm", 1.0), SAM()], max_duration="2ba")

    assert [record.getMessage() for record in caplog.records if "once per step" in record.getMessage()] == []
