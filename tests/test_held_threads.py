"""Held weights while threads evaluate and others write or train."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact_twins import images, loss_of, tiny
from held_weights import modes
from torch.testing import assert_close

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.deferral import Memory
from ws_algorithm.multi_tensor import standardize_all
from ws_algorithm.parametrization import raw_weight


@pytest.fixture
def write_while_standardizing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """What a thread does at the worst moment: edit a raw weight after it was read and before its value is held."""

    def arm(raw: Any) -> None:
        pending = [raw]

        def standardize_then_write(raws: Any, *arguments: Any) -> Any:
            results = standardize_all(raws, *arguments)
            if pending and any(one is raw for one in raws):
                with torch.no_grad():
                    pending.pop().add_(torch.arange(3.0).view(1, 1, 1, 3))
            return results

        for module in ("holding", "deferral"):
            monkeypatch.setattr(f"ws_algorithm.{module}.standardize_all", standardize_then_write, raising=False)

    return arm


@modes
@pytest.mark.parametrize("context", [nullcontext, standardize_once])
def test_a_weight_that_is_written_to_while_it_is_standardized(context, mode, write_while_standardizing):
    model = tiny()
    raw = raw_weight(model[3])
    before = standardize_weight(raw).detach()
    write_while_standardizing(raw)

    with context(model):
        with mode():
            model[3].weight.clone()
            weight = model[3].weight.clone()

        assert_close(weight, standardize_weight(raw).detach())
        assert not torch.allclose(weight, before)


def test_one_written_to_while_the_dtype_of_autocast_is_computed(write_while_standardizing):
    model = tiny(dtype=torch.float32)
    raw = raw_weight(model[3])
    with torch.no_grad():
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


class Dropped(Memory):
    """What a thread sees whose held weight is always dropped at once by another one that trains."""

    held = property(lambda self: None, lambda self, held: None)  # type: ignore[assignment]


@modes
def test_a_held_weight_that_a_training_thread_drops_at_once(mode):
    model = tiny()
    model[3].parametrizations["weight"][0].memory.__class__ = Dropped

    with mode():
        assert_close(model[3].weight.clone(), standardize_weight(raw_weight(model[3])).detach())


@pytest.mark.parametrize("context", [nullcontext, standardize_once])
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
