"""Every classification model of torchvision: the set of convolutions, and their order against a real forward."""

import inspect
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import regnet

from ws_algorithm.functional import apply_weight_standardization, remove_weight_standardization
from ws_algorithm.selection import Rules, select_convolutions

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# By default these two warn about the initialization that they would choose
ARGUMENTS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def build(name: str) -> nn.Module:
    block_widths = regnet.BlockParams.from_init_params

    def block_widths_on_cpu(*args, **kwargs):  # numbers computed with tensors, which must not be on the meta device
        with torch.device("cpu"):
            return block_widths(*args, **kwargs)

    with mock.patch.object(regnet.BlockParams, "from_init_params", block_widths_on_cpu), torch.device("meta"):
        return torchvision.models.get_model(name, weights=None, **ARGUMENTS.get(name, {}))


def names_in_executed_order(model: nn.Module) -> list[str]:
    """By last call in a forward under hooks; those that do not run come first."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    calls = dict.fromkeys(names.values(), -1)
    count = 0

    def record(module, args, output):
        nonlocal count
        calls[names[module]] = count
        count += 1

    hooks = [module.register_forward_hook(record) for module in names]
    model(torch.empty(2, 3, 224, 224, device="meta"))
    for hook in hooks:
        hook.remove()
    return sorted(calls, key=lambda name: calls[name])


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_classification_model(name):
    model = build(name)
    executed = names_in_executed_order(model.eval())
    convolutions = {module for module in model.modules() if isinstance(module, CONVOLUTIONS)}
    fan_in_1 = {module for module in convolutions if module.weight[0].numel() == 1}

    for training in (True, False):
        model.train(training)
        assert apply_weight_standardization(model) == len(convolutions - fan_in_1)
        assert remove_weight_standardization(model) == len(convolutions - fan_in_1)
    selection = select_convolutions(model, Rules(1))
    choices = selection.choices

    assert selection.failure is None or "arange" in selection.failure
    assert [choice.name for choice in choices] == executed
    assert [c.name for c in choices if c.skipped_because == "n_last_layers_ignore=1"] == executed[-1:]
    assert not fan_in_1


def test_the_models_that_are_tested():
    functions = {name for name, value in vars(torchvision.models).items() if inspect.isfunction(value)}
    others = {"get_model", "get_model_builder", "get_model_weights", "get_weight", "list_models"}

    assert set(torchvision.models.list_models(module=torchvision.models)) == functions - others
