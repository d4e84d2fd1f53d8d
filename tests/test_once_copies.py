"""What is copied and saved inside ``standardize_once`` is what is copied and saved without.

As ``exact_twins`` says, every loop runs with the context and without.
"""

import copy
import io
import pickle
from typing import Any

import torch
from exact_twins import Context, assert_near, check, gradients, images, loss_of, tiny
from torch import nn

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight


def test_a_deep_copy():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            copied = copy.deepcopy(model)
            loss_of(model, second).backward()
            loss_of(copied, third).backward()
            inside = gradients(copied)
            with torch.no_grad():
                raw_weight(copied[0]).mul_(torch.arange(1.0, 4.0).view(1, 3, 1, 1))
            assert torch.equal(copied[0].weight, standardize_weight(raw_weight(copied[0])))
            loss_of(copied, first).backward()
            loss_of(model, third).backward()
        loss_of(copied, second).backward()
        with context(copied):
            loss_of(copied, third).backward()
        return inside, gradients(copied)

    check(tiny, loop)


def test_a_deep_copy_without_gradients_so_far():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0])
            with torch.no_grad():
                loss_of(model, images()[0])
            copied = copy.deepcopy(model)
        loss_of(model, images()[0]).backward()
        loss_of(copied, images()[1]).backward()
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        return gradients(copied)

    check(tiny, loop)


def names_of(model: nn.Module) -> Any:
    names: list[Any] = [[name for name, _ in model.named_parameters()], [name for name, _ in model.named_buffers()]]
    return [*names, [name for name, _ in model.named_modules()], list(model.state_dict())]


def test_what_is_saved_inside():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0]).backward()
            with torch.no_grad():
                loss_of(model, images()[0])
            state_dict = pickle.loads(pickle.dumps(model.state_dict()))
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            names = names_of(model)
        file.seek(0)
        size = len(file.getvalue())
        return dict(state_dict), dict(torch.load(file, weights_only=True)), names, size

    model = check(tiny, loop)

    assert names_of(model) == names_of(tiny())


def test_loading_back_what_was_saved_inside():
    model = tiny()
    with standardize_once(model):
        loss_of(model, images()[0]).backward()
        saved = copy.deepcopy(model.state_dict())
    other = tiny("paper")
    for parameter in other.parameters():
        nn.init.normal_(parameter)

    other.load_state_dict(saved)

    assert_near(dict(other.state_dict()), dict(tiny().state_dict()))
