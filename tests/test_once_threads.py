"""``standardize_once`` with several threads: inside one context, and with a context each."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from exact_twins import Context, assert_near, check, exactly, gradients, images, loss_of, tiny

from ws_algorithm import standardize_once


def run_at_once(tasks: list[Callable[[], Any]]) -> None:
    """Each task in a thread of its own; an exception of one of them is raised here."""
    errors: list[BaseException] = []

    def run(task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def in_a_thread(task: Callable[[], Any]) -> None:
    run_at_once([task])


def test_threads_inside_one_context():
    """Many times, since one thread has to come in the way of another."""

    def train(context: Context) -> Any:
        model = tiny()

        def backwards(start: int) -> None:
            for turn in range(6):
                loss_of(model, images()[(start + turn) % 3]).backward()

        with context(model):
            run_at_once([lambda start=start: backwards(start) for start in range(4)])
        return gradients(model)

    expected = train(exactly)
    for _ in range(30):
        assert_near(train(standardize_once), expected, tolerance=1e-11)  # sums in any order


def test_a_backward_of_one_thread_between_the_deliveries_of_another():
    """What a thread has passed on must not be taken for what another one has."""

    def loop(model: Any, context: Context) -> None:
        first, second, _ = images()
        with context(model):
            hidden = model[:4](first)
            hidden.register_hook(lambda gradient: in_a_thread(lambda: loss_of(model, second).backward()))
            (model[3:](model[:3](first)).square().mean() + hidden.square().mean()).backward()

    check(tiny, loop)


def test_a_context_of_another_thread_on_the_same_model_is_refused():
    model = tiny()

    def open_another() -> None:
        with standardize_once(model):
            loss_of(model, images()[1]).backward()

    def loop(model: Any, context: Context) -> None:
        with context(model):
            loss_of(model, images()[0]).backward()
            if context is standardize_once:
                with pytest.raises(ValueError, match="in another thread already. Open one scope around all threads"):
                    in_a_thread(lambda: enter(context(model)))
            loss_of(model, images()[2]).backward()

    check(tiny, loop)
    in_a_thread(open_another)  # when no other is open
    with standardize_once(model):
        loss_of(model, images()[0]).backward()


@pytest.mark.parametrize("part", [slice(0, 3), slice(2, 7)], ids=str)
def test_a_context_of_another_thread_on_a_part_is_refused(part):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            loss_of(model, images()[0]).backward()
            if context is standardize_once:
                with pytest.raises(ValueError, match="another thread"):
                    in_a_thread(lambda: enter(context(model[part])))
            loss_of(model, images()[2]).backward()

    check(tiny, loop)


def test_what_is_refused_leaves_nothing_open():
    """Of a whole, one part of which is in another thread's context, the other part is as before."""

    def loop(model: Any, context: Context) -> None:
        with context(model[6:]):
            if context is standardize_once:
                with pytest.raises(ValueError, match="another thread"):
                    in_a_thread(lambda: enter(context(model)))
                entries = [model[index].parametrizations["weight"][0].cache.entry for index in (0, 3, 6)]
                assert [entry is None for entry in entries] == [True, True, False]
            loss_of(model, images()[0]).backward()
            loss_of(model, images()[2]).backward()

    check(tiny, loop)


def test_contexts_of_several_threads_on_models_of_their_own():
    def train(context: Context) -> Any:
        models = [tiny(), tiny("paper"), tiny("timm")]

        def steps(model: Any) -> None:
            for batch in images():
                with context(model):
                    loss_of(model, batch).backward()
                    loss_of(model, batch + 1).backward()

        run_at_once([lambda model=model: steps(model) for model in models])
        return [gradients(model) for model in models]

    assert_near(train(standardize_once), train(exactly))


def enter(context: AbstractContextManager) -> None:
    with context:
        pass
