"""A detector in a Trainer and out of it: what it gives, and what micro-batches and images without objects do."""

from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import DataSpec
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ws_algorithm.recipes.detector import Batch, Detector
from ws_algorithm.recipes.image_lists import collate, count_images, split_batch

from .models.small_detectors import CLASSES, batch_of, detector, in_double, network

LOSSES = {"faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}}
LOSSES["mask_rcnn"] = LOSSES["faster_rcnn"] | {"loss_mask"}


def one_object(height: int = 64, width: int = 96) -> Batch:
    return batch_of([[4, 4, 40, 40]], height=height, width=width)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_in_training_and_their_sum(name):
    model, batch = detector(name), one_object()

    outputs = model(batch)
    losses = model.loss(outputs, batch)

    assert outputs.keys() == LOSSES[name] and losses.keys() == LOSSES[name] | {"total"}
    torch.testing.assert_close(losses["total"], sum(outputs[key] for key in LOSSES[name]))
    losses["total"].backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.ndim == 1 or parameter.grad.any(), key


@pytest.mark.parametrize("name", LOSSES)
def test_detections_in_evaluation(name):
    model = detector(name, box_score_thresh=0.0).eval()
    batch = batch_of([[4, 4, 40, 40]], [], height=64, width=80)

    with torch.no_grad():
        predictions = model.eval_forward(batch)

    assert len(predictions) == 2
    for prediction in predictions:
        count = len(prediction["scores"])
        assert count > 0
        assert prediction["boxes"].shape == (count, 4)
        assert prediction["boxes"].min() >= 0 and (prediction["boxes"] <= torch.tensor([80, 64, 80, 64])).all()
        assert prediction["labels"].min() >= 1 and prediction["labels"].max() < CLASSES
        assert ("masks" in prediction) == (name == "mask_rcnn")
        if "masks" in prediction:
            assert prediction["masks"].shape == (count, 1, 64, 80)


def test_outputs_of_training_are_no_detections():
    model, batch = detector().eval(), one_object()

    with torch.no_grad():
        predictions = model.eval_forward(batch, outputs={"loss_mask": torch.zeros(())})

    assert [set(prediction) for prediction in predictions] == [{"boxes", "labels", "scores", "masks"}]


@pytest.mark.parametrize("name", LOSSES)
def test_images_without_objects_train_what_is_background(name):
    model, batch = detector(name), batch_of([], [])

    losses = model.loss(model(batch), batch)
    losses["total"].backward()

    assert losses["total"].isfinite()
    assert losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == losses.get("loss_mask", 0) == 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key  # of all: DDP waits for each
        if ".mask_" in key:
            assert not parameter.grad.any(), key
    gradient = model.get_parameter("module.roi_heads.box_predictor.cls_score.weight").grad
    assert gradient is not None and gradient.any()


def test_an_image_without_objects_beside_one_that_has_some():
    model, batch = detector(), batch_of([], [[4, 4, 40, 40], [30, 30, 60, 60]])

    losses = model(batch)

    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] > 0


def test_a_batch_stays_as_it_is():
    model, (images, targets) = detector(), batch_of([[4, 4, 40, 40]], [])
    before = [image.clone() for image in images], [{k: v.clone() for k, v in own.items()} for own in targets]

    model((images, targets))

    assert all(torch.equal(*pair) for pair in zip(images, before[0], strict=True))
    for own, kept in zip(targets, before[1], strict=True):
        assert own.keys() == kept.keys() and all(torch.equal(own[key], kept[key]) for key in own)


def test_losses_under_autocast_are_near_those_without():
    model, batch = detector(box_head="2fc"), one_object()

    torch.manual_seed(0)
    full = model(batch)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch)

    assert {loss.dtype for loss in half.values()} == {torch.float32}
    for key, loss in half.items():
        torch.testing.assert_close(loss, full[key], rtol=0.1, atol=0.01)  # bfloat16 has 8 bits, through 53 layers


class _Counted:
    """A sampler that counts what each image has in a loss."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.counts = sampler, []

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = self.sampler(labels)
        self.counts = [(int(p.sum()), int(p.sum() + n.sum())) for p, n in zip(positive, negative, strict=True)]
        return positive, negative


def gradients(model: Detector, batch: Batch) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[int]]]:
    """The gradients of each loss, and how many each image has of what the loss is the mean over."""
    model.zero_grad()
    losses = model(batch)
    rpn, regions = network(model).rpn.fg_bg_sampler.counts, network(model).roi_heads.fg_bg_sampler.counts
    counts = dict.fromkeys(["loss_objectness", "loss_rpn_box_reg"], [sampled for _, sampled in rpn])
    counts |= dict.fromkeys(["loss_classifier", "loss_box_reg"], [sampled for _, sampled in regions])
    counts["loss_mask"] = [positive for positive, _ in regions]
    trained = ("module.backbone.fpn", "module.rpn", "module.roi_heads", "module.backbone.body.layer4.2")  # to be quick
    named = {name: parameter for name, parameter in model.named_parameters() if name.startswith(trained)}
    found = {}
    for key, loss in losses.items():
        values = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        found[key] = {name: value for name, value in zip(named, values, strict=True) if value is not None}
    return found, counts


@pytest.fixture(scope="module")
def batch_and_parts() -> tuple[Any, list[Any]]:
    """Gradients of a batch of four images, and of each of its images alone; nothing is left to chance."""
    torch.manual_seed(17)
    everything: dict[str, Any] = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    small: dict[str, Any] = {"min_size": 32, "max_size": 48, "rpn_post_nms_top_n_train": 3}
    model = detector(**everything, **small).double()
    nn.init.normal_(network(model).roi_heads.box_predictor.bbox_pred.weight, std=0.1)
    for part in (network(model).rpn, network(model).roi_heads):
        part.fg_bg_sampler = _Counted(part.fg_bg_sampler)
    objects = [[[4, 4, 40, 40]], [], [[10, 10, 90, 50], [30, 20, 60, 60]], [[50, 5, 95, 60]]]
    batch = in_double(batch_of(*objects))
    parts = [gradients(model, ([image], [target])) for image, target in zip(*batch, strict=True)]
    return gradients(model, batch), parts


@pytest.mark.parametrize("loss", sorted(LOSSES["mask_rcnn"]))
def test_gradients_of_a_batch_are_those_of_its_images_weighted_by_what_each_has_in_the_loss(batch_and_parts, loss):
    (whole, counts), parts = batch_and_parts
    shares = [count / sum(counts[loss]) for count in counts[loss]]
    assert [own[1][loss][0] for own in parts] == counts[loss]
    if loss == "loss_mask":
        assert shares[1] == 0  # no object, no mask
    assert len(set(shares)) > 1  # else plain means were enough

    for name, gradient in whole[loss].items():
        expected = sum(share * own[0][loss][name] for share, own in zip(shares, parts, strict=True))
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)  # through 60 layers in float64


def test_gradients_of_a_batch_are_not_the_plain_mean_of_micro_batches(batch_and_parts):
    (whole, _), parts = batch_and_parts
    name = "module.roi_heads.mask_predictor.mask_fcn_logits.weight"

    mean = torch.stack([own[0]["loss_mask"][name] for own in parts]).mean(dim=0)

    assert not torch.allclose(mean, whole["loss_mask"][name], rtol=0.1)


class Pairs(torch.utils.data.Dataset):
    """Images with one object or none."""

    def __init__(self, boxes: list[list[list[float]]]) -> None:
        images, targets = batch_of(*boxes)
        self.pairs = list(zip(images, targets, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def loaded(boxes: list[list[list[float]]], batch_size: int) -> DataSpec:
    return DataSpec(
        DataLoader(Pairs(boxes), batch_size, collate_fn=collate),
        split_batch=split_batch,
        get_num_samples_in_batch=count_images,
    )


def test_a_trainer_trains_by_micro_batches_of_one_and_evaluates():
    model = detector()
    boxes = [[[4, 4, 40, 40]], [], [[10, 10, 90, 50], [30, 20, 60, 60]], [[50, 5, 95, 60]]]
    before = model.get_parameter("module.backbone.fpn.inner_blocks.0.0.weight").detach().clone()
    trainer = Trainer(
        model=model,
        train_dataloader=loaded(boxes, 4),
        eval_dataloader=loaded(boxes[:3], 2),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        max_duration="1ba",
        device_train_microbatch_size=1,
        device="cpu",
        progress_bar=False,
    )

    trainer.fit()
    trainer.eval()

    assert trainer.state.loss["total"].isfinite()  # pyright: ignore
    assert not torch.equal(model.get_parameter("module.backbone.fpn.inner_blocks.0.0.weight"), before)
    values: dict[str, Any] = trainer.state.eval_metric_values
    assert list(values) == [
        f"{kind}{figure}" for kind in ("Box", "Mask") for figure in ("AP50", "AP75", "APs", "APm", "APl", "AP")
    ]
    assert all(value.ndim == 0 and (0 <= value <= 1 or value == -1) for value in values.values())
    trainer.close()
