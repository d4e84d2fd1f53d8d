"""What a conversion decides: the source, the rows of classes, the input, the options, the convolutions it is for."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ws_algorithm import Formula, ImageInput, convert_checkpoint
from ws_algorithm.checkpoints.class_rows import arrange_rows
from ws_algorithm.checkpoints.conversion import SOURCES
from ws_algorithm.checkpoints.targets import target_shapes

SCORES, BOXES = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
MASKS = "roi_heads.mask_predictor.mask_fcn_logits"


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # one number of memory each


def weights_of(model: str, num_classes: int = 1000, norm: Any = "group") -> dict[str, Tensor]:
    return zeros(target_shapes(model, num_classes, norm))


def blobs_of(model: str) -> dict[str, Tensor]:
    """The blobs of a classifier, by their names in Caffe2."""
    blobs = {}
    for name, tensor in weights_of(model).items():
        blob = re.sub(r"layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_", name)
        blob = re.sub(r"_(conv|bn)([123])\.", lambda m: f"_branch2{'abc'[int(m[2]) - 1]}_{m[1]}.", blob)
        blob = (
            blob.replace("downsample.0", "branch1_conv").replace("downsample.1", "branch1_bn").replace("fc.", "pred_")
        )
        blob = (
            blob.replace("conv1.weight", "conv1_w") if blob.startswith("conv1") else blob.replace("bn1.", "conv1_bn.")
        )
        blob = blob.replace("_conv.weight", "_w").replace("_bn.weight", "_gn_s").replace("_bn.bias", "_gn_b")
        blobs[blob.replace("pred_weight", "pred_w").replace("pred_bias", "pred_b")] = tensor
    return blobs


def composer_weights(model: str, plain: tuple[str, ...] = (), **arguments: Any) -> dict[str, Tensor]:
    """As a ComposerClassifier saves them after Composer's algorithm, but for convolutions that it left alone."""
    found = {}
    for name, tensor in weights_of(model, **arguments).items():
        layer = name.removesuffix(".weight")
        raw = tensor.ndim == 4 and layer not in plain
        found[f"module.{layer}.parametrizations.weight.original" if raw else f"module.{name}"] = tensor
    return found


def test_the_authors_classifiers_are_told_from_backbones_of_mmdetection():
    plain = weights_of("resnet50")
    without_classifier = {name: tensor for name, tensor in plain.items() if not name.startswith("fc.")}
    with_gn = {re.sub(r"\bbn(\d)", r"gn\1", name): tensor for name, tensor in plain.items()}
    prefixed = {f"backbone.{name}": tensor for name, tensor in without_classifier.items()}

    assert convert_checkpoint(plain, model="resnet50").source == "weight_standardization"
    for weights in (without_classifier, with_gn, prefixed):
        assert convert_checkpoint(weights, model="resnet50").source == "mmdetection_backbone"


def test_blobs_of_a_resnet_are_detectrons_and_those_of_a_resnext_the_authors():
    resnet, resnext = (convert_checkpoint(blobs_of(arch), model=arch) for arch in ("resnet101", "resnext101_32x4d"))

    assert (resnet.source, resnet.formula) == ("detectron", None)
    assert (resnext.source, resnext.formula) == ("maskrcnn_benchmark", "paper")
    given = convert_checkpoint(blobs_of("resnet50"), "maskrcnn_benchmark", model="resnet50")
    assert (given.formula, given.image_input.scale, len(given.state_dict)) == ("paper", 255.0, 161)


def test_the_first_convolution_of_blobs_is_turned_round_with_the_mean():
    blobs = blobs_of("resnet50")
    blobs["conv1_w"] = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)  # blue, green, red

    converted = convert_checkpoint(blobs, model="resnet50")

    assert converted.state_dict["conv1.weight"][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]
    assert converted.image_input == ImageInput("rgb", 255.0, (122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))


def test_weights_of_torchvision_with_batch_norm_are_of_no_source():
    with pytest.raises(ValueError, match="`source` cannot be told.*BatchNorm and torchvision's weights need no conv"):
        convert_checkpoint(weights_of("resnet50", norm="batch"), model="resnet50")
    with pytest.raises(ValueError, match="It has BatchNorm, and the networks of 'weight_standardization' have GroupN"):
        convert_checkpoint(weights_of("resnet50", norm="batch"), "weight_standardization", model="resnet50")


def test_an_unknown_source_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=rf"`source` \(='mmdet'\) must be one of {', '.join(SOURCES)}, or None"):
        convert_checkpoint(weights_of("resnet50"), "mmdet", model="resnet50")


@pytest.mark.parametrize(
    "given, asked, fits",
    [
        ("resnet101", "resnet50", "resnet101"),
        ("resnext50_32x4d", "resnet50", "resnext50_32x4d"),
        ("resnet50", "mask_rcnn_resnet50", "resnet50"),
    ],
)
def test_the_model_that_would_fit_is_named(given, asked, fits):
    with pytest.raises(
        ValueError, match=f"{re.escape(repr(asked))}, all of them and no others.*`model` '{fits}' would"
    ):
        convert_checkpoint(weights_of(given), model=asked)


def test_one_message_counts_all_that_does_not_fit():
    weights = weights_of("resnet50")
    for name in ("bn1.weight", "bn1.bias", "layer1.0.conv2.weight", "fc.bias"):
        del weights[name]
    weights |= {"epoch": torch.tensor(1), "conv1.weight": torch.zeros(64, 1, 7, 7)}

    with pytest.raises(ValueError) as raised:
        convert_checkpoint(weights, "weight_standardization", model="resnet50")

    assert "4 missing: 'bn1.weight', 'bn1.bias', 'layer1.0.conv2.weight' and 1 more. " in str(raised.value)
    assert "1 left over: 'epoch'. " in str(raised.value)
    assert "1 of another shape: 'conv1.weight' (64, 1, 7, 7) instead of (64, 3, 7, 7). " in str(raised.value)


def test_a_backbone_may_lack_the_classifier_but_not_half_of_it():
    weights = weights_of("resnet50")
    del weights["fc.bias"]

    with pytest.raises(ValueError, match="1 missing: 'fc.bias'"):
        convert_checkpoint(weights, "mmdetection_backbone", model="resnet50")
    del weights["fc.weight"]
    assert len(convert_checkpoint(weights, "mmdetection_backbone", model="resnet50").state_dict) == 159
    with pytest.raises(ValueError, match="2 missing: 'fc.weight', 'fc.bias'"):
        convert_checkpoint(weights, "weight_standardization", model="resnet50")


def test_two_names_for_one_tensor_are_an_error():
    weights = {**weights_of("resnet50"), "gn1.weight": torch.zeros(64)}

    with pytest.raises(ValueError, match="1 left over: 'gn1.weight'"):
        convert_checkpoint(weights, "mmdetection_backbone", model="resnet50")


def test_the_number_of_classes_is_that_of_the_source():
    converted = convert_checkpoint(weights_of("resnet50", 10), model="resnet50")

    assert converted.options == {"num_classes": 10, "norm": "group"}
    assert converted.state_dict["fc.weight"].shape == (10, 2048)


def rows(*values: float) -> dict[str, Tensor]:
    """Scores, boxes and masks whose row of each class has one value, four times of boxes."""
    part = torch.tensor(values)
    return {f"{SCORES}.weight": part[:, None], f"{BOXES}.weight": part.repeat_interleave(4)[:, None]}


def test_the_background_comes_first_and_boxes_have_zeros_for_it():
    tensors = {**rows(1, 2, 0), f"{MASKS}.weight": torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)}
    tensors[f"{BOXES}.weight"] = tensors[f"{BOXES}.weight"][:8]  # of 1 and 2 alone
    arrange_rows(tensors, background_last=True)

    assert tensors[f"{SCORES}.weight"].flatten().tolist() == [0, 1, 2]
    assert tensors[f"{BOXES}.weight"].flatten().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert tensors[f"{MASKS}.weight"].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("background_last", [True, False])
def test_rows_for_all_classes_are_repeated_for_each(background_last):
    tensors = {**rows(0, 1, 2), f"{MASKS}.bias": torch.tensor([7.0])}
    tensors[f"{BOXES}.weight"] = torch.arange(4.0)[:, None]
    arrange_rows(tensors, background_last=background_last)

    assert tensors[f"{BOXES}.weight"].flatten().tolist() == [0, 1, 2, 3] * 3
    assert tensors[f"{MASKS}.bias"].tolist() == [7, 7, 7]


def test_boxes_of_background_and_foreground_are_repeated_for_each_class():
    tensors = {**rows(0, 1, 2), f"{BOXES}.bias": torch.tensor([9.0] * 4 + [5.0] * 4)}
    arrange_rows(tensors, background_last=False)

    assert tensors[f"{BOXES}.bias"].tolist() == [9] * 4 + [5] * 8
    assert tensors[f"{SCORES}.weight"].flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_composers_models_may_have_batch_norm(norm):
    converted = convert_checkpoint(composer_weights("resnet18", norm=norm), model="resnet18")

    assert (converted.source, converted.formula, converted.include) == ("composer", "composer", None)
    assert converted.options == {"num_classes": 1000, "norm": norm}
    assert list(converted.state_dict) == list(target_shapes("resnet18", 1000, norm))


def test_convolutions_that_composer_left_alone_are_left_alone():
    last = ("layer4.1.conv1", "layer4.1.conv2")  # n_last_layers_ignore=2
    converted = convert_checkpoint(composer_weights("resnet18", last), model="resnet18")

    assert converted.include is not None and len(converted.include) == 20 - 2
    assert not set(last) & set(converted.include)


def test_deeplabv3_with_batch_norm_was_trained_without_standardization():
    names = {"classifier.0.convs.4.1": "aspp.aspp5", "classifier.0.convs.4.2": "aspp.aspp5_bn"}
    names |= {
        "classifier.0.project.0": "aspp.conv2",
        "classifier.0.project.1": "aspp.bn2",
        "classifier.1": "aspp.conv3",
    }
    names |= {f"classifier.0.convs.{i}.{j}": f"aspp.aspp{i + 1}{'_bn' * j}" for i in range(4) for j in range(2)}
    weights = {}
    for name, tensor in weights_of("deeplabv3_resnet101", 21, "batch").items():
        layer, _, part = name.removeprefix("backbone.").rpartition(".")
        weights[f"module.{names.get(layer, layer)}.{part}"] = tensor

    converted = convert_checkpoint(weights, model="deeplabv3_resnet101")

    assert (converted.source, converted.formula) == ("deeplabv3_pytorch", None)
    assert converted.options == {"num_classes": 21, "norm": "batch"}
    assert len(converted.state_dict) == len(weights)


def test_networks_of_timm_have_the_eps_of_its_big_transfer():
    converted = convert_checkpoint(weights_of("resnetv2_50x1_bit"), model="resnetv2_50x1_bit")

    assert (converted.source, converted.formula) == ("timm", Formula(1e-8, eps_inside_root=True, unbiased=False))
    assert converted.image_input == ImageInput("rgb", 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert converted.include is not None and len(converted.include) == 53 and "head.fc" not in converted.include


@pytest.mark.parametrize(("formula", "trained"), [("none", None), ("timm", "timm"), (None, "paper")])
def test_a_formula_that_is_given_is_taken_instead_of_the_sources(formula, trained):
    converted = convert_checkpoint(weights_of("resnet50"), model="resnet50", formula=formula)

    assert (converted.source, converted.formula) == ("weight_standardization", trained)


def test_weights_that_were_trained_without_standardization_name_no_convolutions():
    weights = composer_weights("resnet18", ("conv1",))

    assert convert_checkpoint(weights, model="resnet18", formula="paper").include is not None
    assert convert_checkpoint(weights, model="resnet18", formula="none").include is None


@pytest.mark.parametrize("formula", ["affine", "papre", 1, ["paper"]])
def test_a_formula_must_be_one_that_files_without_gains_have(formula):
    with pytest.raises(ValueError, match=r"`formula` \(=.*must be one of composer, paper, .*, 'none' for weights"):
        convert_checkpoint(weights_of("resnet50"), model="resnet50", formula=formula)


@pytest.mark.parametrize(
    ("source", "model", "norm", "needed"),
    [("timm", "resnet50", "group", "stem.conv.weight"), ("composer", "resnet18", "batch", "weight.original")],
)
def test_weights_of_others_are_refused_under_a_source_that_has_the_names_of_its_target(source, model, norm, needed):
    with pytest.raises(ValueError, match=rf"`source` \(='{source}'\) must be where .*{needed}.*such as 'bn1.bias'"):
        convert_checkpoint(weights_of(model, norm=norm), source, model=model)


def test_counters_that_old_versions_of_torch_did_not_save_start_from_0():
    weights = composer_weights("resnet18", norm="batch")
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}

    converted = convert_checkpoint(old, model="resnet18").state_dict

    assert len(old) < len(weights) == len(converted)
    count = converted["layer1.0.bn1.num_batches_tracked"]
    assert (count.shape, count.dtype, int(count)) == ((), torch.int64, 0)


@pytest.mark.parametrize(
    ("state_dict", "arguments", "message"),
    [
        ([torch.zeros(1)], {}, "`state_dict` must have tensors by name, got list. `read_checkpoint` reads a file"),
        ({}, {}, "`state_dict` must have tensors by name, and it is empty"),
        ({"fc.bias": torch.zeros(1), "epoch": 3}, {}, "1 of 2 are none, such as 'epoch', a int"),
        ({1: torch.zeros(1)}, {}, "1 of 1 are none, such as 1, a Tensor"),
        (None, {"model": ["resnet50"]}, r"`model` \(=\['resnet50'\]\) must be one of resnet18"),
        (None, {"source": ["timm"]}, r"`source` \(=\['timm'\]\) must be one of weight_stand"),
    ],
)
def test_arguments_of_other_kinds_are_refused(state_dict, arguments, message):
    given: Any = weights_of("resnet50") if state_dict is None else state_dict

    with pytest.raises(ValueError, match=message):
        convert_checkpoint(given, **{"model": "resnet50", **arguments})
