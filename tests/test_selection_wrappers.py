"""A network inside a module whose forward unpacks a batch in all the ways that people write."""

import logging
from collections.abc import Callable

import pytest
from small_models import defined_in_reverse, left_out
from torch import Tensor, nn


class Wrapper(nn.Module):
    """A ``ComposerModel`` without Composer: the network is `module`, `forward` unpacks a batch."""

    def __init__(self, unpack: Callable) -> None:
        super().__init__()
        self.module = defined_in_reverse()
        self.unpack = unpack

    def forward(self, batch):
        return self.unpack(self.module, batch)


def unpack_rest(module, batch):
    x, *_ = batch
    return module(x)


def unpack_by_length(module, batch):
    return module(batch[0] if len(batch) == 2 else batch)


def unpack_with_assert(module, batch):
    x, _ = batch
    assert x.ndim == 4 and x.shape[1] == 2
    return module(x)


def unpack_by_size(module, batch):
    x, _ = batch
    return module(x) if x.shape[0] > 1 else module(x.repeat(2, 1, 1, 1))


def unpack_keywords(module, batch):
    return module(**batch)


def unpack_and_measure(module, batch):
    x, _ = batch
    return float(module(x).mean())


def unpack_only_tensors(module, batch):
    return module(batch) if isinstance(batch, Tensor) else None


@pytest.mark.parametrize(
    "unpack",
    [
        lambda module, batch: module(batch[0]),
        lambda module, batch: module(batch["image"]),
        unpack_rest,
        unpack_by_length,
        unpack_with_assert,
        unpack_by_size,
        unpack_keywords,
        unpack_and_measure,
        unpack_only_tensors,
    ],
)
def test_a_wrapper_is_looked_through(unpack, caplog):
    with caplog.at_level(logging.WARNING, logger="ws_algorithm"):
        assert left_out(Wrapper(unpack), 1) == ["module.head"]

    assert not caplog.records
