"""Copies of modules, and of what modules keep."""

import functools
import random
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import Model, conv, is_sure, model_of, norm, norms
from torch import nn

from ws_algorithm.tracing.meta_copy import copied_modules, forward_of

OBJECTS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "iterator": lambda: (i for i in range(3)),
    "random generator": lambda: torch.Generator().manual_seed(1),
    "module": lambda: random,
    "activations": lambda: [torch.ones(2, requires_grad=True) * 2],
    "activation": lambda: torch.ones(2, requires_grad=True) * 2,
    "dictionary of locks": lambda: {"a": [threading.RLock()]},
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_a_model_keeps(kind):
    model = model_of(lambda m, x: m.n(m.a(x)))
    model.kept = kept = OBJECTS[kind]()

    assert norms(model) == {"a": "n"}
    assert is_sure(model)
    assert model.kept is kept


@pytest.mark.parametrize("data", [True, False])
def test_copies_are_of_all_modules(data):
    model = nn.Sequential(conv(), nn.Sequential(norm(), nn.ReLU()))

    copies = copied_modules(model, data=data, training=True)

    assert list(copies) == list(model.modules())
    assert list(copies[model].modules()) == list(copies.values())
    assert [type(new) for new in copies.values()] == [type(part) for part in model.modules()]
    assert not set(copies) & set(copies.values())


def test_a_copy_without_data():
    model: Any = Model(lambda m, x: x, conv=conv(), norm=norm())
    model.conv.weight.requires_grad_(False)

    copy = copied_modules(model, data=False, training=True)[model]
    tensors = dict(copy.named_parameters()) | dict(copy.named_buffers())
    assert all(tensor.is_meta for tensor in tensors.values())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensors[name].shape == tensor.shape
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].requires_grad is tensor.requires_grad
        assert not tensor.is_meta


def test_a_copy_with_data():
    model: Any = nn.Sequential(conv(), norm())
    before = model[0].weight.detach().clone()

    copy: Any = copied_modules(model, data=True, training=True)[model]
    with torch.no_grad():
        copy[0].weight.zero_()
        copy[1].running_mean.add_(1)

    assert torch.equal(model[0].weight, before)
    assert torch.equal(model[1].running_mean, torch.zeros(2))


def test_a_copy_has_no_hooks_and_no_gradients():
    model: Any = nn.Sequential(conv())
    model[0].register_forward_hook(lambda *_: None)
    model[0].register_full_backward_hook(lambda *_: None)
    model(torch.ones(1, 2, 4, 4, requires_grad=True)).sum().backward()

    copy: Any = copied_modules(model, data=True, training=True)[model]

    assert not copy[0]._forward_hooks and not copy[0]._backward_hooks
    assert copy[0].weight.grad is None
    assert len(model[0]._forward_hooks) == len(model[0]._backward_hooks) == 1
    assert model[0].weight.grad is not None


def test_a_tied_weight_is_tied_in_the_copy():
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight

    copy: Any = copied_modules(model, data=True, training=True)[model]

    assert copy[0].weight is copy[1].weight
    assert copy[0].weight is not model[0].weight
    assert torch.equal(copy[0].weight, model[0].weight)


def test_modules_in_containers_are_those_of_the_copy():
    """In a list, a dictionary, a partial and an object alike."""
    model: Any = Model(lambda m, x: x, conv=conv())
    model.kept = {"list": [model.conv], "partial": functools.partial(print, model.conv)}
    model.object = types.SimpleNamespace(conv=model.conv)

    copies = copied_modules(model, data=False, training=True)

    copy: Any = copies[model]
    assert copy.kept["list"][0] is copy.kept["partial"].args[0] is copy.object.conv is copies[model.conv]
    assert model.kept["list"][0] is model.kept["partial"].args[0] is model.object.conv is model.conv


def test_what_cannot_be_copied_is_shared():
    model: Any = Model(lambda m, x: x, conv=conv())
    model.lock, model.locks = threading.Lock(), [threading.Lock()]

    copy: Any = copied_modules(model, data=False, training=True)[model]

    assert copy.lock is model.lock
    assert copy.locks is not model.locks and copy.locks == model.locks


def test_the_global_generators_are_not_copied():
    model: Any = Model(lambda m, x: x, conv=conv())
    model.draws = [random.random, np.random.rand]

    copy: Any = copied_modules(model, data=False, training=True)[model]

    assert [draw.__self__ for draw in copy.draws] == [random.random.__self__, np.random.rand.__self__]


def test_the_forward_of_a_compiled_module_is_that_of_its_original():
    model = nn.Sequential(conv(), norm())

    compiled: Any = torch.compile(model, backend="eager")

    assert forward_of(model) == model.forward
    assert forward_of(compiled) is model
    assert norms(compiled) == {"_orig_mod.0": "_orig_mod.1"}
