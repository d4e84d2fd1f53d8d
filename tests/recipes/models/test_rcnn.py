from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import apply_weight_standardization, is_weight_standardized
from ws_algorithm.recipes.detector import Detector
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet

from .small_detectors import BUILDERS, CLASSES, SMALL, batch_of, detector, network
from .small_networks import count

GN = partial(nn.GroupNorm, 32)
LAYERS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}
LAYERS |= {"resnext50_32x4d": LAYERS["resnet50"], "resnext101_32x4d": LAYERS["resnet101"]}


def on_meta(name: str, **arguments: Any) -> Detector:
    with torch.device("meta"):
        return BUILDERS[name](**({"arch": "resnet50"} | arguments))


def published_placement(arch: str, *, masks: bool) -> dict[str, str]:
    """The convolutions that have a norm in mmdetection, by torchvision's names, and those of their norms."""
    body, fpn = "module.backbone.body", "module.backbone.fpn"
    pairs = {f"{body}.conv1": f"{body}.bn1"}
    for stage, blocks in enumerate(LAYERS[arch], 1):
        for block in range(blocks):
            own = f"{body}.layer{stage}.{block}"
            pairs |= {f"{own}.conv{place}": f"{own}.bn{place}" for place in (1, 2, 3)}
        pairs[f"{body}.layer{stage}.0.downsample.0"] = f"{body}.layer{stage}.0.downsample.1"
    blocks = [f"{fpn}.{kind}_blocks.{level}" for kind in ("inner", "layer") for level in range(4)]
    for head in ("box_head", *(["mask_head"] if masks else [])):
        blocks += [f"module.roi_heads.{head}.{place}" for place in range(4)]
    return pairs | {f"{block}.0": f"{block}.1" for block in blocks}


@pytest.mark.parametrize(
    ("name", "arch", "convolutions", "tensors"),
    [
        ("faster_rcnn", "resnet50", 65, 207),
        ("faster_rcnn", "resnet101", 116, 360),
        ("faster_rcnn", "resnext50_32x4d", 65, 207),
        ("faster_rcnn", "resnext101_32x4d", 116, 360),
        ("mask_rcnn", "resnet50", 69, 223),
        ("mask_rcnn", "resnet101", 120, 376),
        ("mask_rcnn", "resnext50_32x4d", 69, 223),
        ("mask_rcnn", "resnext101_32x4d", 120, 376),
    ],
)
def test_norms_and_standardized_convolutions_are_where_the_references_have_them(name, arch, convolutions, tensors):
    model = on_meta(name, arch=arch)
    assert len(network(model).state_dict()) == tensors

    placed = published_placement(arch, masks=name == "mask_rcnn")
    assert apply_weight_standardization(model, layers="normalized") == convolutions == len(placed)

    modules = dict(model.named_modules())
    assert {key for key, module in modules.items() if is_weight_standardized(module)} >= placed.keys()
    plain = {"module.rpn.head.conv.0.0", "module.rpn.head.cls_logits", "module.rpn.head.bbox_pred"}
    plain |= {"module.roi_heads.mask_predictor.mask_fcn_logits"} if name == "mask_rcnn" else set()
    convs = {key for key, module in modules.items() if isinstance(module, nn.Conv2d)}
    assert convs - placed.keys() == plain
    assert not any(is_weight_standardized(modules[key]) for key in plain)
    norms = {key: module for key, module in modules.items() if isinstance(module, nn.GroupNorm)}
    assert norms.keys() == set(placed.values())
    assert {(norm.num_groups, norm.eps) for norm in norms.values()} == {(32, 1e-5)}
    assert not any(modules[key].bias is not None for key in placed)  # pyright: ignore[reportAttributeAccessIssue]


def torchvisions(name: str) -> FasterRCNN:
    """torchvision's own class with the small detector's numbers, and GroupNorm where torchvision lets it in."""
    arguments: dict[str, Any] = {"num_classes": CLASSES, "min_size": 64, "max_size": 96}
    arguments |= {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 12}
    arguments["box_score_thresh"] = 0.0
    body = ResNet(Bottleneck, [3, 4, 6, 3], norm_layer=GN)
    backbone = _resnet_fpn_extractor(body, 5, norm_layer=GN)
    arguments["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=GN)
    if name == "mask_rcnn":
        return MaskRCNN(backbone, mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=GN), **arguments)
    return FasterRCNN(backbone, **arguments)


@pytest.mark.parametrize("name", BUILDERS)
def test_defaults_are_torchvisions_in_keys_losses_and_predictions(name):
    theirs, ours = torchvisions(name), detector(name, anchor_scale=8, box_score_thresh=0.0)
    for parameter in network(ours).roi_heads.box_predictor.parameters():
        nn.init.normal_(parameter, std=0.1)  # so that boxes and classes differ
    theirs.load_state_dict(network(ours).state_dict())
    images, targets = batch_of([[4, 4, 40, 40], [30, 20, 90, 60]], [[50, 10, 90, 50]])

    torch.manual_seed(3)
    expected = theirs(images, targets)
    torch.manual_seed(3)
    losses = ours((images, targets))
    assert losses.keys() == expected.keys()
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key])

    theirs.eval()
    ours.eval()
    with torch.no_grad():
        for own, expected in zip(ours((images, targets)), theirs(images), strict=True):
            assert len(own["boxes"]) > 1
            assert own.keys() == expected.keys()
            for key, value in own.items():
                torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("box_head", ["2fc", "4conv1fc"])
def test_frozen_norms_are_in_the_backbone_alone(box_head):
    model = on_meta("mask_rcnn", norm="frozen", box_head=box_head)

    norms = [key for key, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(norms) == 53 and all(key.startswith("module.backbone.body.") for key in norms)
    assert count(model, nn.GroupNorm, nn.BatchNorm2d) == 0
    body = dict(network(model).backbone.body.named_modules())
    assert all(
        module.bias is not None
        for key, module in network(model).named_modules()
        if isinstance(module, nn.Conv2d) and key.removeprefix("backbone.body.") not in body
    )
    linear = [key for key, module in network(model).roi_heads.box_head.named_modules() if isinstance(module, nn.Linear)]
    assert linear == {"2fc": ["fc6", "fc7"], "4conv1fc": ["5"]}[box_head]


def test_batch_norms_are_where_group_norms_are():
    group, batch = on_meta("mask_rcnn"), on_meta("mask_rcnn", norm="batch")

    kinds = [(group, nn.GroupNorm), (batch, nn.BatchNorm2d)]
    places = [[key for key, module in model.named_modules() if isinstance(module, kind)] for model, kind in kinds]
    assert places[0] == places[1] != []


@pytest.mark.parametrize("frozen_stages", range(5))
def test_frozen_stages_do_not_train(frozen_stages):
    model = on_meta("mask_rcnn", frozen_stages=frozen_stages)
    frozen = {key.split(".")[3] for key, parameter in model.named_parameters() if not parameter.requires_grad}
    trained = {key.split(".")[3] for key, parameter in model.named_parameters() if parameter.requires_grad}

    stages = [f"layer{stage}" for stage in range(1, frozen_stages + 1)]
    assert frozen == ({"conv1", "bn1", *stages} if frozen_stages else set())
    assert not frozen & trained


def test_frozen_stages_are_standardized_too():
    model = on_meta("mask_rcnn", frozen_stages=1)

    assert apply_weight_standardization(model, layers="normalized") == 69
    raw = dict(model.named_parameters())["module.backbone.body.conv1.parametrizations.weight.original"]
    assert not raw.requires_grad


@pytest.mark.parametrize("with_classifier", [True, False])
@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_classification_weights_without_their_classifier(tmp_path, norm, with_classifier):
    source, path = build_imagenet_resnet("resnet50", num_classes=3, norm=norm).module, str(tmp_path / "weights.pt")
    state = source.state_dict()
    torch.save(state if with_classifier else {k: v for k, v in state.items() if not k.startswith("fc.")}, path)

    body = network(detector(norm=norm, pretrained=path)).backbone.body.state_dict()

    assert body.keys() == {key for key in state if not key.startswith("fc.")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in body.items())


def test_weights_of_another_norm_are_refused(tmp_path):
    path = str(tmp_path / "weights.pt")
    torch.save(build_imagenet_resnet("resnet50", norm="batch").module.state_dict(), path)

    with pytest.raises(ValueError, match="Unexpected: 'bn1.running_mean'.*build with `norm` 'batch' or 'frozen'"):
        detector(pretrained=path)


def test_layers_start_as_in_the_references():
    parts = network(detector(box_head_std=0.01))
    fan_in = 256 * 7 * 7
    # 65,000 samples or more for all but the predictors: a few standard errors. The uniform distribution has a third of
    # the square of its bound as variance: XavierFill is 1 / fan_in, with the bound sqrt(3 / fan_in)
    expected = {
        "roi_heads.box_head.0.0": 0.01,
        "roi_heads.box_head.5": fan_in**-0.5,
        "roi_heads.mask_head.0.0": (2 / (9 * 256)) ** 0.5,
        "backbone.fpn.inner_blocks.3.0": 2048**-0.5,
        "rpn.head.conv.0.0": 0.01,
    }
    for key, std in expected.items():
        torch.testing.assert_close(parts.get_parameter(f"{key}.weight").std().item(), std, rtol=0.02, atol=0)
    predictor = parts.roi_heads.box_predictor
    torch.testing.assert_close(predictor.cls_score.weight.std().item(), 0.01, rtol=0.05, atol=0)
    torch.testing.assert_close(predictor.bbox_pred.weight.std().item(), 0.001, rtol=0.05, atol=0)
    for key in ("box_predictor.cls_score", "box_predictor.bbox_pred", "box_head.5", "mask_predictor.conv5_mask"):
        assert not parts.roi_heads.get_parameter(f"{key}.bias").any()


def test_box_head_convolutions_start_over_the_outputs_unless_told_otherwise():
    weight = network(detector()).roi_heads.get_parameter("box_head.2.0.weight")

    torch.testing.assert_close(weight.std().item(), (2 / (9 * 256)) ** 0.5, rtol=0.01, atol=0)


def test_thresholds_and_counts_reach_the_network():
    counts = {f"rpn_{when}_nms_top_n_{mode}": 10 + i for i, (when, mode) in enumerate([
        ("pre", "train"), ("pre", "test"), ("post", "train"), ("post", "test"),
    ])}  # fmt: skip
    model = on_meta(
        "faster_rcnn",
        rpn_batch_size_per_image=21,
        box_batch_size_per_image=22,
        box_score_thresh=0.3,
        box_nms_thresh=0.4,
        box_detections_per_img=5,
        min_size=100,
        max_size=200,
        **counts,
    )
    rpn, heads, transform = network(model).rpn, network(model).roi_heads, network(model).transform

    assert [rpn.pre_nms_top_n(), rpn.post_nms_top_n()] == [10, 12]
    model.eval()
    assert [rpn.pre_nms_top_n(), rpn.post_nms_top_n()] == [11, 13]
    assert (rpn.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.batch_size_per_image) == (21, 22)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.3, 0.4, 5)
    assert (transform.min_size, transform.max_size, transform.size_divisible) == ((100,), 200, 32)


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("arch", "resnet18", "must be one of resnet50, resnet101, resnext50_32x4d, resnext101_32x4d"),
        ("num_classes", 1, "must be at least 2"),
        ("norm", "layer", "must be 'batch', 'group' or 'frozen'"),
        ("box_head", "3fc", "must be '4conv1fc' or '2fc'"),
        ("frozen_stages", 5, "must be at least 0 and at most 4"),
        ("frozen_stages", -1, "must be at least 0 and at most 4"),
        ("min_size", 0, "must be at least 1"),
        ("max_size", 60, "must be at least 64"),
        ("image_format", "bgr", "must be 'rgb' or 'bgr255'"),
        ("anchor_scale", 0, "must be at least 1"),
        ("rpn_pre_nms_top_n_train", 0, "must be at least 1"),
        ("rpn_post_nms_top_n_test", 0, "must be at least 1"),
        ("rpn_batch_size_per_image", 0, "must be at least 1"),
        ("rpn_box_beta", -0.1, "must be at least 0"),
        ("roi_align_sampling_ratio", -1, "must be at least 0"),
        ("box_batch_size_per_image", 0, "must be at least 1"),
        ("box_beta", -1.0, "must be at least 0"),
        ("box_head_std", -0.01, "must be at least 0"),
        ("box_score_thresh", 1.5, "must be at least 0 and at most 1"),
        ("box_nms_thresh", -0.5, "must be at least 0 and at most 1"),
        ("box_detections_per_img", 0, "must be at least 1"),
    ],
)
@pytest.mark.parametrize("name", BUILDERS)
def test_an_argument_out_of_range_is_refused(name, argument, value, rule):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^`{argument}` \(={value!r}\) {rule}"):
        BUILDERS[name](**(SMALL | {argument: value}))


def test_a_box_head_without_convolutions_has_no_start_for_them():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"`box_head_std` \(=0.01\) is for `box_head` '4conv1"),
    ):
        detector(box_head="2fc", box_head_std=0.01)
