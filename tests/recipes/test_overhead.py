"""The cost of Weight Standardization: who takes part, what a step is, how times and bytes are taken."""

import gc
import itertools
import subprocess
import sys
import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_algorithm import apply_weight_standardization, is_weight_standardized
from ws_algorithm.recipes import contest, overhead
from ws_algorithm.recipes.contest import Case, Contestant
from ws_algorithm.recipes.overhead import Spread, measure, ratio_to
from ws_algorithm.recipes.rivals import RIVALS, PaperConv2d, reason_against

from .runs import environment

TINY = Case(model="resnet18", image_size=32, micro_batches=2)


class ConvWS2d(nn.Conv2d):
    """mmcv's layer as it is published: https://github.com/open-mmlab/mmcv, mmcv/cnn/bricks/conv_ws.py."""

    def forward(self, input):
        flat = self.weight.view(self.weight.size(0), -1)
        mean = flat.mean(dim=1, keepdim=True).view(-1, 1, 1, 1)
        std = flat.std(dim=1, keepdim=True).view(-1, 1, 1, 1)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.fixture
def mmcv(monkeypatch):
    """Stands in for a library that is not installed here."""
    module = types.ModuleType("mmcv.cnn")
    module.__dict__["ConvWS2d"] = ConvWS2d
    monkeypatch.setitem(sys.modules, "mmcv", types.ModuleType("mmcv"))
    monkeypatch.setitem(sys.modules, "mmcv.cnn", module)


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=2, dilation=2, bias=False)),
    ).double()


def classifier() -> nn.Sequential:
    torch.manual_seed(4)
    ends = nn.Conv2d(3, 8, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    return nn.Sequential(ends[0], nn.GroupNorm(2, 8), nn.ReLU(), ends[1])


def losses_and_gradients(model: nn.Module, convert: Any, around: Any = nullcontext) -> list[torch.Tensor]:
    """Of two micro-batches; gradients of the parameters that the model has before it is converted."""
    parameters = list(model.parameters())
    convert(model)
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in parameters}
    images = torch.linspace(-1, 1, 2 * 2 * 3 * 15 * 15, dtype=torch.float64).sin().view(2, 2, 3, 15, 15)
    losses = []
    with around(model):
        for batch in images:
            losses.append(model(batch).square().sum())
            losses[-1].backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(gradients) == len(parameters) == 5
    return [loss.detach() for loss in losses] + gradients


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "folded"])
def test_a_contestant_computes_its_formula_and_the_gradients_of_it(name, mmcv):
    rival = RIVALS[name]

    def by_formula(model: nn.Module) -> None:
        if rival.formula is not None:
            apply_weight_standardization(model, formula=rival.formula)

    actual = losses_and_gradients(small_model(), rival.convert, rival.around)

    torch.testing.assert_close(actual, losses_and_gradients(small_model(), by_formula))


def test_the_folded_one_computes_the_same_with_plain_convolutions():
    expected, model = small_model(), small_model()
    apply_weight_standardization(expected)

    RIVALS["folded"].convert(model)

    image = torch.ones(1, 3, 15, 15, dtype=torch.float64)
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(image), expected(image))


def test_all_convolutions_of_a_model_are_replaced():
    model = Contestant("paper", TINY).model

    assert {type(module) for module in model.modules() if isinstance(module, nn.Conv2d)} == {PaperConv2d}
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 20


def test_contestants_start_alike():
    first, second = (Contestant(name, TINY) for name in ("none", "timm"))

    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    for one, other in zip(first.micro_batches, second.micro_batches, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_a_step_moves_the_weights_as_the_gradient_of_the_mean_loss_says(precision, monkeypatch):
    monkeypatch.setattr(contest, "build_model", lambda case: classifier())
    contestant = Contestant("once", Case(image_size=8, micro_batch_size=2, micro_batches=3, precision=precision))
    plain = classifier()
    apply_weight_standardization(plain)
    images, labels = (torch.cat(part) for part in zip(*contestant.micro_batches, strict=True))
    F.cross_entropy(plain(images), labels).backward()

    contestant.train()

    for parameter, other in zip(contestant.model.parameters(), plain.parameters(), strict=True):
        assert other.grad is not None
        moved, expected = parameter - other, -0.01 * other.grad
        # a weight near 1 is rounded to 1e-7; autocast rounds all activations to 8 or 11 bits. A loss that is not
        # divided by the number of micro-batches would be off by 2
        tolerance = 1e-7 * parameter.norm() + (1e-5 if precision == "fp32" else 0.1) * expected.norm()
        assert (moved - expected).norm() <= tolerance


def test_contestants_that_cannot_take_part(monkeypatch):
    monkeypatch.setitem(sys.modules, "composer.functional", None)

    assert "composer.functional cannot be imported" in (reason_against("composer") or "")
    assert reason_against("folded", "train") == "what it trains is not standardized"
    assert reason_against("folded", "eval") is reason_against("exact") is reason_against("timm") is None
    with pytest.raises(ValueError, match="`contestants` has 'composer', which cannot take part: composer.functional"):
        measure(TINY, ["composer"])


def test_a_ratio_is_the_median_of_those_within_rounds():
    none = [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]
    times = [1.0, 4.0, 3.0, 8.0, 5.0, 12.0, 7.0, 16.0, 9.0]

    # the ratios are 1, 2, ..., 9; that of the medians would be 7 / 1
    assert ratio_to(none, times) == Spread(median=5.0, lower=3.0, upper=7.0)
    # 1 1 1 1 1 2 2 2 2
    assert Spread.of(none) == Spread(median=1.0, lower=1.0, upper=2.0)


def test_contestants_take_turns_in_an_order_that_rotates(monkeypatch):
    steps, seconds = [], itertools.count(1)
    monkeypatch.setattr(overhead, "Contestant", lambda name, case: name)
    monkeypatch.setattr(overhead, "_memory", lambda name, case: (1, 2, None))
    monkeypatch.setattr(overhead, "_seconds_of_step", lambda name: steps.append(name) or float(next(seconds)))
    lines = []

    records = measure(TINY, ["once", "exact"], progress=lines.append)

    assert [record.contestant for record in records] == ["none", "once", "exact"]
    rounds = [steps[start : start + 3] for start in range(0, len(steps), 3)]
    assert rounds[:4] == [
        ["none", "once", "exact"],
        ["once", "exact", "none"],
        ["exact", "none", "once"],
        ["none", "once", "exact"],
    ]
    assert len(rounds) == len(lines) == 2 + 9
    # in the third round, the first that counts, seconds 7, 8 and 9 are those of exact, none and once
    assert [record.times[:2] for record in records] == [[8.0, 10.0], [9.0, 11.0], [7.0, 12.0]]
    assert [len(record.times) for record in records] == [9, 9, 9]
    assert lines[0] == "train resnet18 (group norm), 32 px, 2 x 1 image(s), fp32, cpu, 1 thread: round 1 of 11"


def test_bytes_are_those_of_standardized_weights():
    none, exact, once = (overhead._memory(name, TINY) for name in ("none", "exact", "once"))

    model = Contestant("none", TINY).model
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Conv2d)]
    weights = sum(shape.numel() for shape in shapes) * 4
    rows = sum(shape[0] for shape in shapes) * 4
    assert none[1:] == exact[1:] == (0, None)
    assert none[0] is not None and exact[0] is not None and once[0] is not None and once[1] is not None
    assert exact[0] - none[0] == weights + 2 * rows  # layer_norm saves mean and scale of each row
    assert once[0] - none[0] == weights
    assert weights <= once[1] < 1.01 * weights


def test_threads_and_the_garbage_collector_are_left_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        (record,) = measure(Case("resnet18", image_size=32, micro_batches=1, mode="eval", threads=1), ["none"])
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)

    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert record.ratio == Spread(1.0, 1.0, 1.0)
    assert (record.bytes_saved, record.bytes_held, record.peak_bytes) == (None, None, None)
    assert min(record.times) > 0


def test_a_case_that_cannot_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ValueError, match=r"`device` \(='cuda'\) is not there"):
        Case(device="cuda")
    with pytest.raises(ValueError, match=r"`micro_batches` \(=8\) must be 1 in mode 'eval', which runs one batch"):
        Case(mode="eval")
    with pytest.raises(ValueError, match=r"`repeats` \(=8\) must be at least 9"):
        measure(TINY, ["none"], repeats=8)


FAULTS = """
import resource, torch
from ws_algorithm.recipes.overhead import keep_freed_memory

def faults_of_a_step():
    for _ in range(12):
        if _ == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [torch.ones(1_000_000) for _ in range(8)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

print(faults_of_a_step(), keep_freed_memory(), faults_of_a_step())
"""


@pytest.mark.skipif(overhead.platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )

    by_default, kept, afterwards = done.stdout.split()
    assert kept == "True"
    assert float(by_default) > 1000 and float(afterwards) < 0.25 * float(by_default)  # 32 MB are 7812 pages


DETECTOR = Case(model="mask_rcnn_r50", image_size=64, micro_batches=2, regions=8)


def standardized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if is_standardized_by_rivals(module)}


def is_standardized_by_rivals(module: nn.Module) -> bool:
    return type(module) is PaperConv2d or isinstance(module, nn.Conv2d) and is_weight_standardized(module)


def test_a_detector_is_standardized_where_norms_follow():
    ours, authors = (standardized_names(Contestant(name, DETECTOR).model) for name in ("once", "paper"))

    assert ours == authors and len(ours) == 69  # of Mask R-CNN R-50, as published


def test_a_detector_has_the_same_work_whatever_its_weights_are():
    contestant = Contestant("once", DETECTOR)
    sizes: list[int] = []
    heads: Any = contestant.model.roi_heads
    heads.mask_head.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    before = {name: value.clone() for name, value in contestant.model.state_dict().items()}

    contestant.train()
    for parameter in contestant.model.parameters():
        parameter.data.mul_(1.5)
    contestant.train()

    assert sizes == 4 * [2]  # a quarter of 8 regions, in two micro-batches of each step
    assert all(torch.equal(value, 1.5 * before[name]) for name, value in contestant.model.state_dict().items())
    assert all(parameter.grad is not None for parameter in contestant.model.parameters())
    contestant.model.eval()
    contestant.evaluate()
    assert sizes[4:] == [8]


def test_a_detector_needs_its_extra(monkeypatch):
    monkeypatch.setattr(contest, "find_spec", lambda name: None if name == "pycocotools" else name)

    with pytest.raises(ValueError, match=r"`model` \(='mask_rcnn_r50'\) needs pycocotools: pip install \"ws-algorithm"):
        Case(model="mask_rcnn_r50")


def test_the_bytes_of_a_detector_are_those_of_standardized_weights():
    _, held, _ = overhead._memory("once", DETECTOR)

    model = Contestant("once", DETECTOR).model
    convolutions = [module for module in model.modules() if is_standardized_by_rivals(module)]
    weights = sum(conv.weight.numel() for conv in convolutions if isinstance(conv, nn.Conv2d)) * 4
    assert held is not None and weights <= held < 1.01 * weights
