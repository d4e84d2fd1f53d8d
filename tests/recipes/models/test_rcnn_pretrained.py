"""Detectors from files of weights: of a whole detector or of a classifier, for RGB or for BGR."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm import apply_weight_standardization
from ws_algorithm.parametrization import raw_weight
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet

from ..converted_files import DETECTRON, IMAGENET, write_converted
from .small_detectors import detector, network

PATH = "weights.pth"
HEADS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
FILTERS = "backbone.body.conv1.weight"


def same(first: dict[str, Tensor], second: dict[str, Tensor], *, but: tuple[str, ...] = ("nothing",)) -> bool:
    kept = [key for key in first if not key.startswith(but)]
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in kept)


def other_weights() -> dict[str, Tensor]:
    """Those of a Mask R-CNN, unlike any that a builder makes."""
    return {key: torch.rand_like(value) for key, value in network(detector()).state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_whole_detector(prefix, caplog):
    weights = other_weights()
    torch.save({prefix + key: value for key, value in weights.items()}, PATH)

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        loaded = detector(pretrained=PATH, frozen_stages=1)

    assert same(network(loaded).state_dict(), weights) and caplog.records == []
    assert not loaded.get_parameter("module.backbone.body.conv1.weight").requires_grad


def test_a_whole_detector_of_other_classes_starts_its_last_layers_anew(caplog):
    weights = other_weights()
    write_converted(PATH, weights)

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        found = network(detector(num_classes=7, pretrained=PATH)).state_dict()

    assert same(found, weights, but=HEADS)
    assert found["roi_heads.box_predictor.cls_score.weight"].std() < 0.02  # N(0, 0.01), where the file has 0 to 1
    assert "has 4 classes and the network 7: roi_heads.box_predictor.cls_score.weight and" in caplog.text


def test_a_whole_detector_of_another_kind_is_refused():
    torch.save(network(detector("faster_rcnn")).state_dict(), PATH)

    with torch.device("meta"), pytest.raises(ValueError, match="Missing: 'roi_heads.mask_head.0.0.weight'"):
        detector(pretrained=PATH)


@pytest.mark.parametrize("whole", [True, False])
def test_filters_for_rgb_are_turned_round_where_the_network_sees_bgr(whole):
    weights: dict[str, Any] = other_weights() if whole else build_imagenet_resnet("resnet50").module.state_dict()
    write_converted(PATH, weights, image_input=DETECTRON)
    filters = weights[FILTERS if whole else "conv1.weight"]

    loaded = network(detector(pretrained=PATH, image_format="bgr255"))

    image = torch.rand(3, 12, 12, dtype=torch.float64)
    expected = F.conv2d(255 * image - torch.tensor(DETECTRON["mean"]).view(3, 1, 1), filters.double())
    actual = F.conv2d(loaded.transform.double().normalize(image), loaded.backbone.body.conv1.weight.double())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-4)  # sums of 147 products up to 255
    assert not torch.equal(loaded.backbone.body.conv1.weight, filters)


def test_filters_that_see_what_they_expect_stay_as_they_are():
    weights = other_weights()
    write_converted(PATH, weights, image_input=IMAGENET)

    assert torch.equal(network(detector(pretrained=PATH)).state_dict()[FILTERS], weights[FILTERS])


@pytest.mark.parametrize(("image_input", "image_format"), [(DETECTRON, "rgb"), (IMAGENET, "bgr255")])
def test_images_that_weights_do_not_expect_are_refused(image_input, image_format):
    write_converted(PATH, build_imagenet_resnet("resnet50").module.state_dict(), image_input=image_input)

    with torch.device("meta"), pytest.raises(ValueError) as caught:
        detector(pretrained=PATH, image_format=image_format)

    message = str(caught.value)
    assert message.startswith(
        f"`pretrained` (={PATH!r}) must fit the images that the network sees. The weights expect "
    )
    for text in ("RGB from 0 to 1, mean 0.485, 0.456, 0.406", "from 0 to 255, mean 1", "; the network sees "):
        assert text in message


def test_plain_weights_of_a_detector_load_strictly_into_a_standardized_one():
    weights, model = other_weights(), network(detector())
    apply_weight_standardization(model, layers="normalized")

    model.load_state_dict(weights, strict=True)

    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert all(torch.equal(raw_weight(conv), weights[f"{name}.weight"]) for name, conv in convolutions.items())
    torch.testing.assert_close(model.backbone.body.conv1.weight.mean((1, 2, 3)), torch.zeros(64))
