"""Networks with gain and shift: one trained without Weight Standardization goes on with it, in a Trainer or not."""

import copy
import logging
from typing import Any

import pytest
import torch
from composed_runs import fit, prepare
from composer.models import ComposerClassifier
from gain_and_shift import gain_and_shift
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock, ResNet

from ws_algorithm import (
    WeightStandardization,
    apply_weight_standardization,
    fold_weight_standardization,
    standardize_once,
    standardize_weight,
)
from ws_algorithm.parametrization import raw_weight

both = pytest.mark.parametrize("formula", ["affine", "scaled"])


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of stripes that lie or stand, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    waves = torch.sin(torch.arange(16.0) + 6 * torch.rand(count, 1, generator=generator))
    lying = waves[:, None, :, None].expand(-1, 3, -1, 16)
    images = torch.where(labels.view(-1, 1, 1, 1) == 1, lying, lying.transpose(2, 3))
    return images + 0.8 * torch.randn(images.shape, generator=generator), labels


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for seed in range(steps):
        images, labels = stripes(32, seed)
        optimizer.zero_grad()
        with standardize_once(model):
            for part, answers in zip(images.chunk(2), labels.chunk(2), strict=True):
                (nn.functional.cross_entropy(model(part), answers) / 2).backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(stripes(64, 1000)[0])


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A ResNet with batch norms that has learned to tell stripes that lie from those that stand."""
    torch.manual_seed(4)
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.3  # for a run of few steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("ws_algorithm.once"), "disabled", True)
        train(network, 12)
    return network


def accuracy(scores: Tensor) -> float:
    return (scores.argmax(1) == stripes(64, 1000)[1]).double().mean().item()


def test_a_trained_resnet_keeps_its_function_and_goes_on_learning(trained, caplog):
    expected, model = logits(trained), copy.deepcopy(trained)
    assert accuracy(expected) > 0.9

    with caplog.at_level(logging.WARNING):
        assert apply_weight_standardization(model, formula="affine") == 12

    assert caplog.records == []
    actual = logits(model)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert accuracy(actual) == accuracy(expected)

    train(model, 2)
    trained_on = logits(model)
    assert not torch.equal(trained_on, actual) and accuracy(trained_on) > 0.9
    fold_weight_standardization(model)
    assert torch.equal(logits(model), trained_on)


def test_other_formulas_change_the_function_of_a_trained_network_and_say_so(trained, caplog):
    model = copy.deepcopy(trained)

    with caplog.at_level(logging.WARNING):
        apply_weight_standardization(model)

    (warning,) = [record.getMessage() for record in caplog.records]
    assert "ResNet has been trained: its batch norms have counted 24 batches" in warning  # 12 steps of 2 micro-batches
    assert "computes something else" in warning and "formula='affine'" in warning
    assert (logits(model) - logits(trained)).abs().max() > 0.1 * logits(trained).abs().max()


def test_batch_norms_that_have_counted_nothing_are_not_spoken_of(trained, caplog):
    model = copy.deepcopy(trained)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()

    with caplog.at_level(logging.WARNING):
        apply_weight_standardization(model)

    assert caplog.records == []


@pytest.mark.parametrize("formula, told", [("composer", True), ("affine", False), ("scaled", False)])
def test_convolutions_without_norms_are_what_gains_are_for(formula, told, caplog):
    with caplog.at_level(logging.WARNING):
        apply_weight_standardization(nn.Sequential(nn.Conv2d(3, 4, 3)), formula=formula, optimizers=[])

    assert any("no normalization layer" in record.getMessage() for record in caplog.records) == told


def test_frozen_weights_keep_their_function_under_affine(caplog):
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)

    with caplog.at_level(logging.WARNING):
        apply_weight_standardization(conv, formula="affine")

    assert caplog.records == []


# Beside other uses of a network


@both
def test_once_under_autocast(formula):
    models = []
    for once in (False, True):
        torch.manual_seed(6)
        model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 2, 3))
        apply_weight_standardization(model, formula=formula, optimizers=[])
        images = stripes(2, 3)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if once:
                with standardize_once(model):
                    assert model[0].weight.dtype == torch.bfloat16
                    model(images).square().mean().backward()
            else:
                model(images).square().mean().backward()
        models.append(model)
    for exact, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # bfloat16 keeps 8 bits, and inside, the standardized weight is rounded before the gain as well
        assert (actual.grad - exact.grad).norm() <= 2**-5 * exact.grad.norm()


@both
def test_second_order_inside_the_context(formula):
    results = []
    for once in (False, True):
        torch.manual_seed(6)
        model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()
        apply_weight_standardization(model, formula=formula, optimizers=[])
        loss_of = lambda net: net(stripes(2, 3)[0].double()).square().mean()  # noqa: E731
        if once:
            with standardize_once(model):
                loss = loss_of(model)
                first = torch.autograd.grad(loss, raw_weight(model[0]), create_graph=True)[0]
                first.square().sum().backward()
        else:
            first = torch.autograd.grad(loss_of(model), raw_weight(model[0]), create_graph=True)[0]
            first.square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@both
def test_export(formula):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    apply_weight_standardization(model, formula=formula, optimizers=[])
    images = stripes(2, 3)[0]

    exported = torch.export.export(model, (images,)).module()

    assert_close(exported(images), model(images))


# In a Trainer


def classifier() -> Any:
    torch.manual_seed(3)
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return ComposerClassifier(nn.Sequential(*body, nn.Linear(4, 2)), num_classes=2)


def convolutions(trainer: Any) -> tuple[Any, Any]:
    network: Any = trainer.state.model.module
    return network[0], network[2]


@both
def test_a_run_trains_and_resumes_to_the_same_weights(formula, tmp_path):
    def run(**arguments: Any) -> Any:
        algorithm = WeightStandardization(formula=formula)
        return prepare(classifier(), [algorithm], max_duration="2ep", device_train_microbatch_size=2, **arguments)

    whole = run(save_folder=str(tmp_path), save_interval="1ep", save_filename="ep{epoch}.pt")
    starts = [copy.deepcopy(gain_and_shift(conv)) for conv in convolutions(whole)]
    fit(whole)
    resumed = run(load_path=str(tmp_path / "ep1.pt"))
    assert resumed.state.timestamp.batch == 2
    fit(resumed)

    for conv, start in zip(convolutions(whole), starts, strict=True):
        moved = [name for name, part in gain_and_shift(conv).items() if not torch.equal(part, start[name])]
        assert moved == (["gain"] if formula == "scaled" else [])
        parts = gain_and_shift(conv)
        assert torch.equal(conv.weight, standardize_weight(raw_weight(conv), formula, **parts))
    expected, actual = whole.state.model.state_dict(), resumed.state.model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_plain_checkpoint_that_is_loaded_after_init_keeps_its_function(tmp_path):
    plain = fit(prepare(classifier(), [], save_folder=str(tmp_path), save_filename="plain.pt"))

    loaded = prepare(
        classifier(),
        [WeightStandardization(formula="affine")],
        load_path=str(tmp_path / "plain.pt"),
        load_weights_only=True,
        load_strict_model_weights=True,
    )

    for conv, source in zip(convolutions(loaded), convolutions(plain), strict=True):
        assert torch.equal(raw_weight(conv), source.weight)
        assert_close(conv.weight, source.weight, rtol=1e-5, atol=1e-6)
    fit(loaded)
