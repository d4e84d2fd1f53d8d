"""Looking at a model while others run, and while it is looked at elsewhere."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import conv, norm
from torch import Tensor, nn

from ws_algorithm import inspect_convolutions

IMAGE = torch.linspace(0, 1, 128).reshape(1, 2, 8, 8)


class Net(nn.Module):
    """Also changes itself in its forward."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.dropout, self.head = body, nn.Dropout(0.5), conv()
        self.outputs: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            x = x + 1
        x = self.dropout(self.body(x))
        self.outputs[len(self.outputs) % 100] = x
        return self.head(x)


class OnlyTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError("only for tensors")
        return super().forward(x)


class Repeated(threading.Thread):
    """Does something again and again."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act, self.ended, self.count, self.failures = act, threading.Event(), 0, []

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                self.act()
                self.count += 1
        except BaseException as error:  # reported by the main thread
            self.failures.append(error)

    def __enter__(self) -> "Repeated":
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.ended.set()
        self.join()
        assert self.count > 0
        assert self.failures == []


@pytest.mark.parametrize("cls", [Net, OnlyTensors])
@pytest.mark.parametrize("shares", ["nothing", "the body", "all"])
def test_forwards_in_another_thread(cls, shares, tmp_path):
    body = nn.Sequential(conv(), norm(), nn.ReLU(), conv()).eval()
    model = cls(body).eval()
    other = {"nothing": lambda: cls(nn.Sequential(conv(), norm())).eval(), "the body": lambda: cls(body).eval()}
    running = model if shares == "all" else other[shares]()
    expected = running(IMAGE)
    hooked: list[bool] = []
    running.body[0].register_forward_hook(lambda module, args, output: hooked.append(type(output) is Tensor))

    def forward() -> None:
        assert torch.equal(running(IMAGE), expected)
        assert torch.is_grad_enabled()
        (tmp_path / "file").write_text("x")
        torch.save({}, tmp_path / "checkpoint")

    example_input = IMAGE if cls is OnlyTensors else None
    with Repeated(forward) as thread:
        found = {str(inspect_convolutions(model, 1, example_input=example_input)) for _ in range(50)}
        while thread.count < 3 and thread.is_alive():
            pass

    assert len(found) == 1
    assert all(hooked)


def test_two_look_at_once():
    model = Net(nn.Sequential(conv(), norm(), nn.ReLU(), conv()))
    found: list[str] = []

    with Repeated(lambda: found.append(str(inspect_convolutions(model, 1)))):
        for _ in range(25):
            found.append(str(inspect_convolutions(model, 1)))

    assert len(set(found)) == 1
