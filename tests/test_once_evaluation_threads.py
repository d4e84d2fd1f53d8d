"""``standardize_once`` while threads evaluate and others write or train."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cached_weights import contexts, modes
from exact_twins import images, loss_of, tiny
from torch.testing import assert_close

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.multi_tensor import standardize_all
from ws_algorithm.parametrization import raw_weight


@pytest.fixture
def write_while_standardizing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """What a thread does at the worst moment: edit a raw weight after it was read and before its value is cached."""
    pending: list[Any] = []

    def standardize_then_write(weights: Any, outputs: Any, formula: Any) -> None:
        standardize_all(weights, outputs, formula)
        if pending and any(weight.data_ptr() == pending[0].data_ptr() for weight in weights):
            with torch.no_grad():
                pending.pop().add_(torch.arange(3.0).view(1, 1, 1, 3))

    monkeypatch.setattr("ws_algorithm.weight_cache.standardize_all", standardize_then_write)
    yield pending.append
    assert pending == []  # else nothing was written


@modes
def test_a_weight_that_is_written_to_while_it_is_standardized(mode, write_while_standardizing):
    model = tiny()
    raw = raw_weight(model[3])
    before = standardize_weight(raw).detach()
    write_while_standardizing(raw)

    with standardize_once(model):
        with mode():
            model[3].weight.clone()
            weight = model[3].weight.clone()

        assert_close(weight, standardize_weight(raw).detach())
        assert not torch.allclose(weight, before)


def test_one_written_to_while_the_dtype_of_autocast_is_computed(write_while_standardizing):
    model = tiny(dtype=torch.float32)
    raw = raw_weight(model[3])
    with standardize_once(model), torch.no_grad():
        assert model[3].weight.dtype == torch.float32
        write_while_standardizing(raw)
        with torch.autocast("cpu", torch.bfloat16):
            assert model[3].weight.dtype == torch.bfloat16
            assert_close(model[3].weight, standardize_weight(raw).bfloat16())
        assert_close(model[3].weight, standardize_weight(raw))


def test_gradients_of_one_written_to_while_it_is_standardized(write_while_standardizing):
    model, exact = tiny(), tiny()
    raw = raw_weight(model[3])
    write_while_standardizing(raw)

    with standardize_once(model):
        with torch.no_grad():
            model(images()[0])
        loss_of(model, images()[1]).backward()
        loss_of(model, images()[2]).backward()
    with torch.no_grad():
        raw_weight(exact[3]).copy_(raw)
    loss_of(exact, images()[1]).backward()
    loss_of(exact, images()[2]).backward()

    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert_close(one.grad, other.grad)


@contexts
def test_evaluation_beside_training(context):
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    errors: list[Exception] = []
    is_over = threading.Event()

    def evaluate() -> None:
        while not is_over.is_set():
            try:
                with torch.no_grad():
                    for index in (0, 3, 6):
                        model[index].weight.sum()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=evaluate) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        optimizer.zero_grad()
        with context(model):
            for batch in images(count=2):
                loss_of(model, batch).backward()
        optimizer.step()
    is_over.set()
    for thread in threads:
        thread.join()

    assert errors == []
    for index in (0, 3, 6):
        with torch.no_grad():
            assert_close(model[index].weight, standardize_weight(raw_weight(model[index])))


@contexts
@modes
def test_threads_that_evaluate_inside_one_scope(mode, context):
    """All at once, from the first read on, and joined before the scope ends."""
    model = tiny()
    batch = images()[0]
    with torch.no_grad():
        expected = model(batch)

    for _ in range(30):
        outputs: list[Any] = []

        def evaluate(outputs: list[Any] = outputs) -> None:
            with mode():
                for _ in range(5):
                    outputs.append(model(batch).clone())

        with context(model):
            threads = [threading.Thread(target=evaluate) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(outputs) == 20  # of 4 threads, 5 each
        assert_close(outputs, [expected] * 20)
