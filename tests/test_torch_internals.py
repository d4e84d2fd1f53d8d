"""The private parts of PyTorch that the package uses: these fail when PyTorch changes what they say."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Tracer
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ws_algorithm.once import unsupported_reason
from ws_algorithm.torch_internals import (
    hook_count,
    is_compiled,
    is_in_backward,
    is_recorded,
    is_reduced_by_ddp,
    is_transformed,
    may_leave_out_layers,
    shares_memory,
    will_accumulate,
)


class Asks(nn.Module):
    """Adds 1 and notes what a question is answered within its forward."""

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        answers: list[Any] = []
        self.ask = lambda: answers.append(question())
        self.get_answers = lambda: answers

    @property
    def answers(self) -> list[Any]:
        return self.get_answers()

    def forward(self, x: Tensor) -> Tensor:
        self.ask()
        return x + self.weight


def run_on_fake_tensors(model: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.ones(2))


RECORDERS: dict[str, Callable[[Any], Any]] = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, torch.ones(2), check_trace=False),
    "torch.fx": lambda model: Tracer().trace(model),
    "make_fx": lambda model: make_fx(model)(torch.ones(2)),
    "torch.export": lambda model: torch.export.export(model, (torch.ones(2),), strict=False),
    "fake tensors": run_on_fake_tensors,
}
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "torch.vmap": lambda model: torch.vmap(model)(torch.ones(3, 2)),
    "torch.func.grad": lambda model: torch.func.grad(lambda x: model(x).sum())(torch.ones(2)),
    "torch.func.jvp": lambda model: torch.func.jvp(model, (torch.ones(2),), (torch.ones(2),)),
}


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
def test_what_is_traced_is_recorded(record):
    tensor = torch.ones(2)
    model = Asks(lambda: is_recorded(tensor))

    record(model)

    assert model.answers and all(model.answers)
    model(tensor)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(tensor)
    assert model.answers[-2:] == [False, False]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_torch_func_transforms_is_transformed(transform):
    model = Asks(is_transformed)

    transform(model)

    assert model.answers and all(model.answers)
    model(torch.ones(2))
    assert model.answers[-1] is False


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_that_a_checkpoint_repeats_is_in_a_backward(use_reentrant):
    model = Asks(is_in_backward)
    outputs: Any = checkpoint(model, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
    outputs.square().sum().backward()
    model(torch.ones(2))

    assert model.answers in ([False, True, False], [False, False])  # what saves nothing need not be repeated
    assert not is_in_backward()


def test_a_hook_is_in_a_backward_and_one_that_raises_leaves_it():
    answers: list[bool] = []
    x = torch.ones(2, requires_grad=True)

    def fail(gradient: Tensor) -> None:
        answers.append(is_in_backward())
        raise KeyError

    x.register_hook(fail)
    with pytest.raises(KeyError):
        x.sum().backward()

    assert answers == [True] and not is_in_backward()


def test_a_leaf_is_accumulated_to_by_a_backward_that_reaches_it_and_not_by_grad():
    one, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    answers: list[tuple[bool, bool]] = []
    nodes = [leaf.expand_as(leaf).grad_fn.next_functions[0][0] for leaf in (one, other)]  # type: ignore[union-attr]

    def loss() -> Tensor:
        product = one * other
        product.register_hook(lambda gradient: answers.append((will_accumulate(nodes[0]), will_accumulate(nodes[1]))))
        return product.sum()

    loss().backward()
    loss().backward(inputs=[one])
    torch.autograd.grad(loss(), [one])
    torch.autograd.grad(loss(), [one, other])

    assert answers == [(True, True), (True, False), (False, False), (False, False)]
    assert not will_accumulate(nodes[0])  # outside of a backward


def test_hooks_of_both_kinds_are_counted():
    leaf = torch.ones(2, requires_grad=True)
    counts = [hook_count(leaf)]

    first = leaf.register_hook(lambda gradient: None)
    counts.append(hook_count(leaf))
    second = leaf.register_post_accumulate_grad_hook(lambda leaf: None)
    counts.append(hook_count(leaf))
    first.remove()
    second.remove()

    assert [*counts, hook_count(leaf)] == [0, 1, 2, 0]


def test_a_hook_on_a_leaf_gets_none_for_a_gradient_that_is_withheld():
    """By which the package tells gradients from elsewhere."""
    seen: list[Any] = []

    class Withholds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> None:
            return None

    leaf: Any = torch.ones(2, requires_grad=True)
    leaf.register_hook(seen.append)
    withhold: Any = Withholds.apply
    withhold(leaf).sum().backward()
    (withhold(leaf).sum() + 3 * leaf.sum()).backward()

    assert seen[0] is None and torch.equal(seen[1], torch.tensor([3.0, 3.0]))
    assert len(seen) == 2 and torch.equal(leaf.grad, torch.tensor([3.0, 3.0]))


USES: dict[str, Callable[[Tensor], Any]] = {
    "a view": lambda tensor: tensor.view(-1),
    "an alias": lambda tensor: tensor.detach(),
    "a row": lambda tensor: tensor[0],
    "a graph": lambda tensor: nn.functional.linear(torch.ones(1, 3, requires_grad=True), tensor.detach()),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_memory_is_shared_while_another_tensor_uses_it(use):
    tensor = torch.ones(2, 3)
    assert not shares_memory(tensor)

    used = use(tensor)
    assert shares_memory(tensor)

    del used
    assert not shares_memory(tensor)


def test_the_gradients_of_the_terms_of_a_sum_share_memory():
    shared: list[bool] = []

    class Notes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Tensor:
            shared.append(shares_memory(gradients[0]))
            return gradients[0]

    one, other = torch.ones(2, 3, requires_grad=True), torch.ones(6, requires_grad=True)
    noted: Any = Notes.apply
    (noted(one) + noted(other).view(2, 3)).square().sum().backward()
    noted(one).square().sum().backward()

    assert shared[:2] != [False, False] and shared[2] is False


def test_a_model_under_replicate_is_left_to_autograd(process_group):
    from torch.distributed._composable.replicate import replicate

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert unsupported_reason(list(model.modules())) is None

    replicate(model)

    assert "replicate" in (unsupported_reason(list(model.modules())) or "")


def test_a_distributed_forward_is_reduced_but_within_no_sync(process_group):
    cases: list[tuple[dict[str, Any], bool]] = [({}, False)]
    cases += [({"find_unused_parameters": True}, True), ({"static_graph": True}, True)]
    for arguments, without_sync in cases:
        model = Asks(is_reduced_by_ddp)
        parallel = DistributedDataParallel(model, **arguments)
        assert may_leave_out_layers(parallel) is without_sync and not may_leave_out_layers(model)
        parallel(torch.ones(2)).sum().backward()
        if not arguments.get("static_graph"):
            with parallel.no_sync():
                parallel(torch.ones(2)).sum().backward()
            assert model.answers == [True, without_sync]
        with torch.no_grad():
            model(torch.ones(2))
        assert model.answers[0] is True and model.answers[-1] is False


def test_other_threads_are_in_no_backward_of_this_one():
    answers: list[bool] = []
    x = torch.ones(2, requires_grad=True)

    def ask(gradient: Tensor) -> None:
        thread = threading.Thread(target=lambda: answers.append(is_in_backward()))
        thread.start()
        thread.join()

    x.register_hook(ask)
    x.sum().backward()

    assert answers == [False]


@pytest.mark.parametrize("way", ["torch.compile", "compile", "forward"])
def test_what_torch_compile_made_is_compiled(way):
    model: Any = nn.Sequential(nn.Linear(2, 2))
    assert not any(map(is_compiled, model.modules()))

    if way == "torch.compile":
        model = torch.compile(model, backend="eager")
    elif way == "compile":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")

    assert any(map(is_compiled, model.modules()))
