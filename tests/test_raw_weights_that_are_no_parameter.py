"""A raw weight that is no ``Parameter`` of its parametrization: of ``DataParallel``, pruned, set by hand, of FSDP.

This file is also what each of two processes runs for FSDP: ``test_raw_weights_that_are_no_parameter.py FOLDER``.
"""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import prune
from torch.testing import assert_close
from two_processes import results_of_two_processes

from ws_algorithm import FORMULAS, apply_weight_standardization, standardize_once, standardize_weight

TESTS = Path(__file__).parent
SEED = 6
CONTEXTS: dict[str, Callable[[nn.Module], Any]] = {
    "plain loop": lambda model: contextlib.nullcontext(),
    "inside a scope": standardize_once,
}
contexts = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
formulas = pytest.mark.parametrize("formula", FORMULAS)


def network(formula: str = "composer") -> Any:
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.GroupNorm(2, 4)]
    model = nn.Sequential(*body).double()
    apply_weight_standardization(model, formula=formula, optimizers=[])
    return model


def batch() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# Replicas of DataParallel. Two devices are not needed: `replicate` makes both on the CPU


@pytest.fixture
def replicas_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[Any]]:
    """torch's own ``replicate`` for two devices, less the copies to them: clones that autograd follows."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module, "_broadcast_coalesced_reshape", lambda tensors, devices, detach: [[t.clone() for t in tensors]] * 2
    )
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: 0)
    return lambda model: module.replicate(model, [0, 1], not torch.is_grad_enabled())


@contexts
@formulas
def test_replicas_compute_and_differentiate_as_the_model(formula, context, replicas_on_cpu):
    model, exact = network(formula), network(formula)
    first, second = batch().chunk(2)
    outputs, expected = torch.zeros(0), torch.ones(0)

    with context(model):
        for _ in range(2):
            replicas = replicas_on_cpu(model)
            outputs = torch.cat([replica(part) for replica, part in zip(replicas, (first, second), strict=True)])
            outputs.square().sum().backward()
            model(first).square().sum().backward()
    for _ in range(2):
        expected = exact(batch())
        expected.square().sum().backward()
        exact(first).square().sum().backward()

    assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    assert_close(gradients(model), gradients(exact), rtol=1e-10, atol=1e-12)


@contexts
def test_replicas_in_evaluation(context, replicas_on_cpu):
    model = network().eval()
    expected = model(batch()).detach()

    with context(model), torch.no_grad():
        for _ in range(2):
            replicas = replicas_on_cpu(model)
            outputs = [replica(part) for replica, part in zip(replicas, batch().chunk(2), strict=True)]
            assert_close(torch.cat(outputs), expected)
            assert_close(model(batch()), expected)


@contexts
def test_replicas_in_threads(context, replicas_on_cpu):
    """As ``parallel_apply`` runs them, which asks for devices."""
    from concurrent.futures import ThreadPoolExecutor

    model, exact = network(), network()
    with context(model):
        replicas = replicas_on_cpu(model)
        with ThreadPoolExecutor(2) as threads:
            outputs = list(threads.map(lambda pair: pair[0](pair[1]), zip(replicas, batch().chunk(2), strict=True)))
        torch.cat(outputs).square().sum().backward()
    exact(batch()).square().sum().backward()

    assert_close(gradients(model), gradients(exact), rtol=1e-10, atol=1e-12)


# A raw weight that is computed, or a plain tensor


@contexts
@formulas
def test_a_pruned_raw_weight(formula, context):
    model = network(formula)
    chain = model[0].parametrizations.weight
    prune.l1_unstructured(chain, "original", amount=0.5)
    mask = chain.original_mask

    with context(model):
        for _ in range(2):
            model(batch()).square().sum().backward()

    raw = chain.original_orig.detach().requires_grad_()
    plain = network(formula)
    weight = standardize_weight(raw * mask, formula)
    if FORMULAS[formula].rescaling == "affine":
        weight = plain[0].parametrizations.weight[1](weight)  # gain and shift of the weight before it was pruned
    for _ in range(2):
        outputs = nn.functional.conv2d(batch(), weight, plain[0].bias)
        plain[1:](outputs).square().sum().backward(retain_graph=True)
    assert int((mask == 0).sum()) == 108 and torch.equal(chain.original, raw * mask)
    assert_close(chain.original_orig.grad, raw.grad, rtol=1e-10, atol=1e-12)


@contexts
def test_a_raw_weight_that_was_set_as_a_plain_tensor(context):
    """As of hypernetworks and meta learning: deleted, and set to the result of a computation."""
    model = network()
    chain = model[0].parametrizations.weight
    start = chain.original.detach().clone().requires_grad_()
    del chain.original
    chain.original = 2 * start + 0.1

    with context(model):
        asked = [torch.autograd.grad(model(batch()).square().sum(), start, retain_graph=True)[0] for _ in range(2)]

    exact = network()
    with torch.no_grad():
        exact[0].parametrizations.weight.original.mul_(2).add_(0.1)
    exact(batch()).square().sum().backward()
    assert_close(asked, [2 * exact[0].parametrizations.weight.original.grad] * 2, rtol=1e-10, atol=1e-12)


@contexts
def test_a_raw_weight_beside_the_parameters(context):
    model = network()
    expected = model(batch()).detach()
    chain = model[0].parametrizations.weight
    vars(chain)["original"] = chain._parameters.pop("original")

    with context(model):
        assert_close(model(batch()).detach(), expected)
        with torch.no_grad():
            assert_close(model(batch()), expected)


# FSDP in two processes


def train_sharded(use_orig_params: bool, is_in_scopes: bool) -> Tensor:
    """Three steps of two micro-batches on each rank; the outputs at the end."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = network("paper").float()
    sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        with standardize_once(sharded) if is_in_scopes else contextlib.nullcontext():
            for part in batch().float().chunk(4)[distributed.get_rank() :: 2]:
                sharded(part).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return sharded(batch().float())


def train_in_one_process() -> tuple[Tensor, Tensor]:
    """The outputs before and after the same steps."""
    model = network("paper").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model(batch().float()).detach()
    for _ in range(3):
        optimizer.zero_grad()
        for part in batch().float().chunk(4):
            (model(part).square().mean() / 2).backward()  # those of two ranks are averaged
        optimizer.step()
    return before, model(batch().float()).detach()


CASES = [(use_orig_params, is_in_scopes) for use_orig_params in (False, True) for is_in_scopes in (False, True)]


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    distributed.init_process_group("gloo")
    results: dict[Any, Any] = {}
    for case in CASES:
        try:
            results[case] = train_sharded(*case)
        except Exception as error:
            results[case] = f"{type(error).__name__}: {error}"
    torch.save(results, Path(folder) / f"{distributed.get_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of_two_processes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("use_orig_params, is_in_scopes", CASES)
def test_fsdp_trains_as_one_process(use_orig_params, is_in_scopes, ranks):
    before, expected = train_in_one_process()

    for results in ranks:
        outputs = results[use_orig_params, is_in_scopes]
        assert not isinstance(outputs, str), outputs
        assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, rtol=1e-2)


if __name__ == "__main__":
    from leaving import leave_together

    main(*sys.argv[1:])
    leave_together()
