"""The same numbers as Composer's own function, where that one does what it should."""

import copy

import pytest
import torch
from composer.functional import apply_weight_standardization as composers_apply
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock, ResNet

from ws_algorithm import apply_weight_standardization

IMAGES, LABELS = (4, 3, 32, 32), 10


def small_resnet() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=LABELS, norm_layer=lambda width: nn.GroupNorm(8, width))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor):
    optimizer.zero_grad()
    output = model(images)
    F.cross_entropy(output, labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return output, gradients


@pytest.mark.parametrize("n_last_layers_ignore", [0, 1])
def test_outputs_gradients_and_five_steps(n_last_layers_ignore):
    ours = small_resnet()
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (ours, theirs)]

    count = apply_weight_standardization(ours, n_last_layers_ignore)

    # stem, two in each of 4 blocks, a shortcut in 3 of them
    assert count == composers_apply(theirs, n_last_layers_ignore) == 12 - n_last_layers_ignore
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(5):
        images, labels = torch.randn(IMAGES), torch.randint(LABELS, IMAGES[:1])
        (output, gradients), (their_output, their_gradients) = (
            step(model, optimizer, images, labels) for model, optimizer in zip((ours, theirs), optimizers, strict=True)
        )
        # 1e-5: twelve layers of float32 rounding in another order
        assert_close(output, their_output, rtol=1e-5, atol=1e-5)
        assert_close(gradients, their_gradients, rtol=1e-5, atol=1e-5)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-5)
