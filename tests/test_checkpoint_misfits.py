"""A checkpoint that is not the one of the model asked for is refused, by the names of the tensors that do not fit."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from sources import big_transfer, deeplabv3_pytorch, detectron, maskrcnn_benchmark, mmdetection, weight_standardization
from torch import Tensor, nn

from ws_algorithm import convert_checkpoint

Weights = dict[str, Tensor]


def _zeros(shapes: dict[str, tuple[int, ...]]) -> Weights:
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # one number of memory each


def _weights(build: Callable[[], nn.Module], prefix: str = "") -> Weights:
    with torch.device("meta"):
        return _zeros({f"{prefix}{key}": tuple(tensor.shape) for key, tensor in build().state_dict().items()})


def _jhu() -> Weights:
    with torch.device("meta"):
        return _zeros({key: tuple(t.shape) for key, t in mmdetection.backbone(50).state_dict().items()})


# Weights, the model that they are of, and one tensor from their middle by their name and by the name in our model
SOURCES: dict[str, tuple[Callable[[], Weights], str, str, str]] = {
    "weight_standardization": (
        lambda: _weights(lambda: weight_standardization.Classifier(50), "module."),
        "resnet50",
        "layer3.2.conv2.weight",
        "layer3.2.conv2.weight",
    ),
    "mmdetection": (
        lambda: _weights(mmdetection.MMDetector),
        "mask_rcnn_resnet50",
        "roi_head.bbox_head.shared_convs.2.gn.bias",
        "roi_heads.box_head.2.1.bias",
    ),
    "mmdetection_backbone": (_jhu, "resnet50", "layer2.0.downsample.1.weight", "layer2.0.downsample.1.weight"),
    "detectron": (
        lambda: _zeros(dict(detectron.detector_shapes(50))),
        "mask_rcnn_resnet50",
        "fpn_inner_res3_3_sum_lateral_gn_s",
        "backbone.fpn.inner_blocks.1.1.weight",
    ),
    "maskrcnn_benchmark": (
        lambda: _weights(maskrcnn_benchmark.MaskRCNNBenchmark, "module."),
        "mask_rcnn_resnet50",
        "roi_heads.mask.feature_extractor.mask_fcn3.0.weight",
        "roi_heads.mask_head.2.0.weight",
    ),
    "deeplabv3_pytorch": (
        lambda: _weights(deeplabv3_pytorch.DeepLab, "module."),
        "deeplabv3_resnet101",
        "aspp.aspp4_bn.weight",
        "classifier.0.convs.3.1.weight",
    ),
    "timm": (
        lambda: _weights(partial(timm.create_model, "resnetv2_50x1_bit")),
        "resnetv2_50x1_bit",
        "stages.1.blocks.3.norm2.bias",
        "stages.1.blocks.3.norm2.bias",
    ),
    "big_transfer": (
        lambda: _weights(big_transfer.ResNetV2),
        "resnetv2_50x1_bit",
        "body.block3.unit04.conv2.weight",
        "stages.2.blocks.3.conv2.weight",
    ),
}


def _full_name(weights: Weights, key: str) -> str:
    return next(name for name in weights if name.endswith(key))


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_missing_is_named(source):
    build, model, key, ours = SOURCES[source]
    weights = build()
    del weights[_full_name(weights, key)]

    with pytest.raises(ValueError, match=f"1 missing: '{re.escape(ours)}'"):
        convert_checkpoint(weights, source, model=model)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_left_over_is_named(source):
    build, model, *_ = SOURCES[source]

    weights = build()
    prefix = "module." if all(name.startswith("module.") for name in weights) else ""
    weights[f"{prefix}discriminator.conv1.weight"] = torch.zeros(1)

    with pytest.raises(ValueError, match="1 left over: '.*discriminator.conv1.weight'"):
        convert_checkpoint(weights, source, model=model)


@pytest.mark.parametrize("source", SOURCES)
def test_a_shape_of_another_network_is_named(source):
    build, model, key, _ = SOURCES[source]
    weights = build()
    name = _full_name(weights, key)
    weights[name] = torch.zeros(7, *weights[name].shape[1:])

    with pytest.raises(ValueError, match=re.escape(key)):
        convert_checkpoint(weights, source, model=model)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_told_from_its_keys(source):
    build, model, *_ = SOURCES[source]

    assert convert_checkpoint(build(), model=model).source == source


def test_keys_of_no_source_are_an_error_that_names_the_sources():
    with pytest.raises(ValueError, match="`source`.*weight_standardization.*mmdetection.*detectron"):
        convert_checkpoint({"encoder.embed.weight": torch.zeros(3, 3)}, model="resnet50")


@pytest.mark.parametrize(
    "depth, model, named",
    [(101, "resnet50", "layer3.6.conv1.weight"), (50, "resnet101", "layer3.6.conv1.weight")],
    ids=["too deep", "not deep enough"],
)
def test_another_depth_is_refused(depth, model, named):
    weights = _weights(lambda: weight_standardization.Classifier(depth))

    with pytest.raises(ValueError, match=re.escape(named)):
        convert_checkpoint(weights, "weight_standardization", model=model)


def test_groups_of_another_network_are_refused():
    weights = _weights(lambda: weight_standardization.Classifier(50, 32))  # the keys are those of ResNet-50 too

    with pytest.raises(ValueError, match="layer1.0.conv1.weight"):
        convert_checkpoint(weights, "weight_standardization", model="resnet50")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_the_same_with_and_without_the_prefix_of_a_parallel_network(prefix):
    weights = _weights(lambda: weight_standardization.Classifier(50), prefix)

    assert "layer4.2.bn3.bias" in convert_checkpoint(weights, model="resnet50").state_dict


@pytest.mark.parametrize("source", ["weight_standardization", "maskrcnn_benchmark", "deeplabv3_pytorch"])
def test_a_prefix_that_no_source_writes_is_an_error_that_names_a_key_with_it(source):
    build, model, *_ = SOURCES[source]
    weights = {f"student.{key.removeprefix('module.')}": tensor for key, tensor in build().items()}

    with pytest.raises(ValueError, match=r"student\."):
        convert_checkpoint(weights, source, model=model)


def test_a_prefix_of_some_keys_alone_is_an_error():
    weights = _weights(lambda: weight_standardization.Classifier(50))
    weights["module.layer1.0.bn1.bias"] = weights.pop("layer1.0.bn1.bias")

    with pytest.raises(ValueError, match=r"layer1\.0\.bn1\.bias"):
        convert_checkpoint(weights, "weight_standardization", model="resnet50")


def test_momentum_of_detectron_is_left_out_and_that_of_a_blob_it_has_not_is_an_error():
    weights = _zeros(dict(detectron.classifier_shapes(50)))
    momentum = {f"{name}_momentum": tensor for name, tensor in weights.items()}

    assert len(convert_checkpoint({**weights, **momentum}, "detectron", model="resnet50").state_dict) == 161
    with pytest.raises(ValueError, match="1 left over: 'keypoint_w_momentum'"):
        convert_checkpoint({**weights, "keypoint_w_momentum": torch.zeros(3)}, "detectron", model="resnet50")
