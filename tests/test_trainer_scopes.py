"""The scopes that the algorithm opens in a Trainer: around each evaluation and prediction, whatever ends it."""

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulating_runs import classifier, data, prepare
from composer import Trainer
from composer.algorithms import EMA, SWA
from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from ws_algorithm import WeightStandardization, apply_weight_standardization, standardize_weight
from ws_algorithm.layers import raw_weight

pytestmark = pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning")

EVALUATES: dict[str, Callable[[Trainer], Any]] = {
    "eval": lambda trainer: trainer.eval(eval_dataloader=DataLoader(data(), batch_size=4)),
    "predict": lambda trainer: trainer.predict(DataLoader(data(), batch_size=4), return_outputs=False),
}
evaluates = pytest.mark.parametrize("kind", EVALUATES)


def trainer_of(*algorithms: Algorithm, **arguments: Any) -> Trainer:
    return prepare([*algorithms] if algorithms else [WeightStandardization()], max_duration="4ba", **arguments)


class ReadsWeights(Callback):
    """What the first convolution computes with in each batch. Kept, so that no two have one address."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def _read(self, state: State, logger: Logger) -> None:
        network: Any = state.model.module
        self.weights.append(network[0].weight)

    eval_after_forward = predict_after_forward = _read


def network_of(trainer: Trainer) -> Any:
    return trainer.state.model.module


def assert_nothing_is_cached(trainer: Trainer) -> None:
    """An edit that nothing tells of is seen by the next forward, in any mode."""
    network = network_of(trainer)
    images = data().tensors[0]
    for is_training in (True, False):
        network.train(is_training)
        for index in (0, 3):
            raw_weight(network[index]).data.view(-1)[1] += 1.0
        with torch.no_grad():
            outputs = network(images)
            expected = images
            for layer in network:
                if hasattr(layer, "parametrizations"):
                    weight = standardize_weight(raw_weight(layer))
                    expected = torch.nn.functional.conv2d(expected, weight, layer.bias)
                else:
                    expected = layer(expected)
        assert_close(outputs, expected, rtol=1e-10, atol=1e-10)
        assert all(network[index].parametrizations["weight"][0].cache.entry is None for index in (0, 3))


@evaluates
def test_an_evaluation_computes_each_weight_once(kind):
    reads = ReadsWeights()
    trainer = trainer_of(callbacks=reads)
    trainer.fit()
    EVALUATES[kind](trainer)

    assert len(reads.weights) == 4 and len({weight.data_ptr() for weight in reads.weights}) == 1
    assert_close(reads.weights[0], standardize_weight(raw_weight(network_of(trainer)[0])).detach())
    assert_nothing_is_cached(trainer)


@evaluates
def test_an_evaluation_without_a_fit_does_so_too(kind):
    reads = ReadsWeights()
    trainer = trainer_of(callbacks=reads)
    EVALUATES[kind](trainer)

    assert len({weight.data_ptr() for weight in reads.weights}) == 1
    assert_nothing_is_cached(trainer)


@evaluates
def test_autograd_standardizes_an_evaluation_when_it_is_told_to(kind):
    reads = ReadsWeights()
    trainer = trainer_of(WeightStandardization(once_per_step=False), callbacks=reads)
    EVALUATES[kind](trainer)

    assert len({weight.data_ptr() for weight in reads.weights}) == 4


# Exceptions


class Raises(Callback):
    """Raises at one event of the second batch."""

    def __init__(self, event: str) -> None:
        self.count = 0
        setattr(self, event, self._raise)

    def _raise(self, state: State, logger: Logger) -> None:
        self.count += 1
        if self.count == 2:
            raise ArithmeticError("stop")


def raise_in_forward(trainer: Trainer) -> None:
    count = [0]

    def fail(*_: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise ArithmeticError("stop")

    network_of(trainer)[2].register_forward_hook(fail)


@pytest.mark.parametrize("is_training_before", [True, False], ids=["from training mode", "from evaluation mode"])
@pytest.mark.parametrize("event", ["batch_start", "before_forward", "in the forward", "after_forward", "batch_end"])
@evaluates
def test_an_exception_that_ends_an_evaluation_leaves_nothing_cached(kind, event, is_training_before):
    trainer = trainer_of(callbacks=Raises(f"{kind}_{event}") if " " not in event else None)
    trainer.state.model.train(is_training_before)
    if " " in event:
        raise_in_forward(trainer)

    with pytest.raises(ArithmeticError, match="stop"):
        EVALUATES[kind](trainer)

    assert trainer.state.model.training is is_training_before
    assert_nothing_is_cached(trainer)


@pytest.mark.parametrize("event", ["in the forward", "after_forward", "before_loss", "before_backward"])
def test_an_exception_that_ends_a_step_leaves_nothing_cached(event):
    trainer = trainer_of(callbacks=Raises(event) if " " not in event else None)
    if " " in event:
        raise_in_forward(trainer)

    with pytest.raises(ArithmeticError, match="stop"):
        trainer.fit()

    network = network_of(trainer)
    images = data().tensors[0]
    with torch.no_grad():
        before = network(images)
        raw_weight(network[0]).data.view(-1)[1] += 1.0
        after = network(images)
        assert torch.equal(network[0].weight, standardize_weight(raw_weight(network[0])))
    assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ArithmeticError])
@pytest.mark.parametrize("event", ["in the forward", "before_forward"])
def test_what_stops_a_step_leaves_the_model_to_autograd(event, error):
    """Nothing is deferred or cached in a loop by hand through a part of the model, and nothing stays on the model."""

    def fail(*_: Any) -> None:
        raise error("stop")

    results = []
    for once in (True, False):
        callback = Callback()
        if event == "before_forward":
            callback.before_forward = fail  # type: ignore[method-assign]
        trainer = trainer_of(WeightStandardization(once_per_step=once), callbacks=callback)
        network = network_of(trainer)
        hook = network[2].register_forward_hook(fail) if event == "in the forward" else None
        with pytest.raises(error):
            trainer.fit()
        if hook is not None:
            hook.remove()
        raw_weight(network[0]).data.view(-1)[1] += 1.0
        for forward in (network, lambda batch, model=trainer.state.model: model((batch, None))):
            trainer.state.model.zero_grad()
            forward(data().tensors[0]).square().mean().backward()
            results.append({name: parameter.grad for name, parameter in network.named_parameters()})
        copied = copy.deepcopy(trainer.state.model)
        assert "forward" not in vars(trainer.state.model) and "forward" not in vars(copied)

    for once, exact in zip(results[:2], results[2:], strict=True):
        assert_close(once, exact, rtol=1e-9, atol=1e-12)


def test_a_forward_that_the_user_has_put_on_the_model_stays_there():
    calls = []
    trainer = trainer_of()
    model: Any = trainer.state.model
    own = model.forward
    model.forward = patched = lambda batch: calls.append(1) or own(batch)

    trainer.fit()

    assert len(calls) == 4 * 4 and vars(model)["forward"] is patched


def test_a_session_that_is_forgotten_leaves_gradients_that_are_true():
    from ws_algorithm.once import StandardizeOnceSession

    models = [classifier(), classifier()]
    for model in models:
        apply_weight_standardization(model)
    session = StandardizeOnceSession(models[0])
    session.open()
    for model in models:
        for batch in data().tensors[0].split(4):
            model.module(batch).square().mean().backward()

    del session
    gc.collect()

    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
    assert models[0].module[0].parametrizations["weight"][0].cache.entry is None


def test_no_hook_stays_on_the_model():
    trainer = trainer_of()
    trainer.fit()
    EVALUATES["predict"](trainer)

    hooks = [
        hook for module in trainer.state.model.modules() for hook in (module._forward_hooks, module._forward_pre_hooks)
    ]
    assert not any(hooks)


# Averages, which move weights at the ends of an evaluation


class MovesThroughData(Algorithm):
    """Puts other weights into the model while it is evaluated, in a way that PyTorch does not count."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        parameters = list(state.model.parameters())
        if event == Event.EVAL_START:
            self.kept = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.view(-1)[0] += 2.0
        else:
            for parameter, values in zip(parameters, self.kept, strict=True):
                parameter.data.copy_(values)


AVERAGES: dict[str, Callable[[], Algorithm]] = {
    "EMA": lambda: EMA(half_life="1ba"),
    "SWA": lambda: SWA(swa_start="0.25dur", swa_end="1dur", update_interval="1ba"),
    "through data": MovesThroughData,
}


class EvaluatedWeights(ReadsWeights):
    """Beside the weights, what they must be: those of the raw weights at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[Tensor] = []

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        self._read(state, logger)
        network: Any = state.model.module
        self.expected.append(standardize_weight(raw_weight(network[0])).detach())


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", AVERAGES)
def test_weights_that_are_moved_for_an_evaluation_are_those_that_it_uses(name, place):
    other, reads = AVERAGES[name](), EvaluatedWeights()
    ours = WeightStandardization()
    evaluation: Any = {"eval_dataloader": DataLoader(data(), batch_size=8), "eval_interval": "1ba"}
    trainer = trainer_of(*([ours, other] if place == "first" else [other, ours]), callbacks=reads, **evaluation)

    trainer.fit()

    assert len(reads.weights) == 4 * 2
    for weight, expected in zip(reads.weights, reads.expected, strict=True):
        assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    if name == "through data":  # and training goes on with the weights of before
        plain = trainer_of(WeightStandardization(once_per_step=False), **evaluation)
        plain.fit()
        for key, value in plain.state.model.state_dict().items():
            assert_close(trainer.state.model.state_dict()[key], value, rtol=1e-9, atol=1e-9)


def test_a_scope_on_a_model_without_standardized_layers_warns_once_not_at_every_step(caplog):
    from ws_algorithm import remove_weight_standardization, standardize_once

    model = classifier()
    with caplog.at_level(logging.WARNING, "ws_algorithm"):
        for _ in range(3):
            with standardize_once(model):
                pass
    remove_weight_standardization(model)

    assert len([record for record in caplog.records if "nothing is standardized once" in record.getMessage()]) == 1
