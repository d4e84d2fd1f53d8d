"""Looking at a model must not change it, nor anything around it."""

import random

import numpy as np
import pytest
import torch
from small_models import choose, conv, defined_in_reverse, left_out
from torch import Tensor, nn


class Restless(nn.Module):
    """A model whose forward changes everything within its reach."""

    def __init__(self, traceable: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2, track_running_stats=True), nn.Dropout())
        self.head = nn.Conv2d(2, 2, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.traceable = traceable
        self.calls = 0
        self.seen = []
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        x = x + torch.rand(()) + random.random() + np.random.rand()
        self.last = self.block(x)
        self.seen.append(self.last)
        self.train(not self.training)
        if not self.traceable and x.sum() > 0:
            x = -x
        return self.head(self.last)


def everything(model: nn.Module) -> dict:
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "objects": [id(value) for value in (*model.modules(), *model.parameters(), *model.buffers())],
        "tensors": {name: (t._version, t.tolist()) for name, t in model.state_dict(keep_vars=True).items()},
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "attributes": {name: dict.fromkeys(vars(module)) for name, module in model.named_modules()},
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("traceable", [True, False])
def test_nothing_changes(traceable, training):
    model = Restless(traceable).train(training)
    before = everything(model)

    choose(model, 1)

    assert everything(model) == before
    assert (model.calls, model.seen, model.last) == (0, [], None)


def test_hooks_do_not_fire():
    model = nn.Sequential(nn.Sequential(conv(), nn.ReLU()), conv())
    fired = []
    for layer in model.modules():
        layer.register_forward_pre_hook(lambda layer, args: fired.append(args))
        layer.register_forward_hook(lambda layer, args, output: fired.append(output))

    assert left_out(model, 1) == ["1"]
    assert fired == []


def test_a_model_on_the_meta_device_stays_there():
    with torch.device("meta"):
        model = defined_in_reverse()

    assert left_out(model, 1) == ["head"]
    assert all(p.is_meta for p in model.parameters())


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        random.random()
        np.random.rand()
        raise KeyboardInterrupt


def test_keyboard_interrupt_is_not_swallowed():
    model = Interrupted()
    before = everything(model)

    with pytest.raises(KeyboardInterrupt):
        choose(model, 1)

    assert everything(model) == before
    assert left_out(defined_in_reverse(), 1) == ["head"]  # and all is in order


class RandomDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.block = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x) if torch.rand(()) < 0.5 or random.random() < 0.1 or np.random.rand() < 0.1 else x


def test_the_choice_does_not_depend_on_random_states():
    """Ranks of a distributed run have a seed each, and must train the same model."""
    choices = set()
    for seed in range(8):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        choices.add(tuple(left_out(RandomDepth(), 1)))

    assert len(choices) == 1
