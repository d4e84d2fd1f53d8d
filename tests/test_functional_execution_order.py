"""Random module trees: the last ``n`` that are left out are those that a real forward executes last."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ws_algorithm import apply_weight_standardization, is_weight_standardized


class Program(nn.Module):
    """A tree of modules, and a forward that calls layers of it by name, in any order and more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    def add(self, path: str, layer: nn.Module) -> None:
        parent: nn.Module = self
        *containers, name = path.split(".")
        for container in containers:
            if not hasattr(parent, container):
                parent.add_module(container, nn.Module())
            parent = parent.get_submodule(container)
        parent.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.order:
            x = torch.relu(self.get_submodule(path)(x))
        return x


CONTAINERS = st.lists(st.sampled_from(["left", "right"]), max_size=3)


@st.composite
def programs(draw) -> Program:
    program = Program()
    paths = []
    for index in range(draw(st.integers(1, 6))):
        layer = nn.Conv2d(2, 2, 1) if draw(st.booleans()) else nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        for alias in range(draw(st.integers(1, 2))):
            paths.append(".".join([*draw(CONTAINERS), f"layer{index}_{alias}"]))
            program.add(paths[-1], layer)
    program.order = draw(st.lists(st.sampled_from(paths), min_size=1, max_size=8))
    return program


def executed(program: Program) -> list[nn.Module]:
    """Its convolutions by last call in a real forward."""
    calls: list[nn.Module] = []
    for module in program.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: calls.append(module))
    program(torch.ones(1, 2, 1, 1))
    return list(reversed(dict.fromkeys(reversed(calls))))


@given(program=programs(), n=st.integers(0, 7))
def test_the_last_executed_are_left_out(program, n):
    convolutions = {module for module in program.modules() if isinstance(module, nn.Conv2d)}
    order = executed(program)

    count = apply_weight_standardization(program, n)

    plain = {module for module in convolutions if not is_weight_standardized(module)}
    assert count == len(convolutions) - len(plain) == max(len(convolutions) - n, 0)
    # Those that never run come before all others
    last = set(order[max(len(order) - n, 0) :])
    assert plain == last if n <= len(order) else plain >= last
