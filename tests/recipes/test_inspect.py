"""``ws-algorithm inspect``: what a person reads, and what a program does."""

import json

import pytest

from ws_algorithm import inspect_convolutions
from ws_algorithm.__main__ import main
from ws_algorithm.recipes.named_models import build_named_model


def inspect(capsys, *arguments: str) -> str:
    assert main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_of_a_detector(capsys):
    """53 in the backbone, 8 in the FPN, 4 in the box head, 4 in the mask head; RPN and mask predictor have no norm."""
    lines = inspect(capsys, "torchvision:maskrcnn_resnet50_fpn_v2", "--layers", "normalized").splitlines()

    rows = lines[1:75]
    assert lines[0].split() == ["convolution", "type", "weight", "fan-in", "normalized", "by", "WS", "why"]
    assert rows[0].split()[:8] == [
        *("0", "backbone.body.conv1", "Conv2d", "64x3x7x7", "147"),
        *("backbone.body.bn1", "(BatchNorm2d)", "yes"),
    ]
    assert [row.split()[1] for row in rows if "  no  " in row] == [
        "rpn.head.conv.0.0",
        "rpn.head.conv.1.0",
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    ]
    assert lines[75] == ""
    assert lines[76] == (
        "torchvision:maskrcnn_resnet50_fpn_v2: 69 of 74 convolutions standardized with layers='normalized'; left "
        "alone: rpn.head.conv.0.0, rpn.head.conv.1.0 (layers='normalized': no norm follows it); rpn.head.cls_logits, "
        "rpn.head.bbox_pred, roi_heads.mask_predictor.mask_fcn_logits (layers='normalized': not known to be followed "
        "by a norm)."
    )
    assert lines[77].startswith("Order: the forward of MaskRCNN cannot be traced (TraceError: ")
    assert "generalized_rcnn.py:" in lines[77]
    assert lines[78].startswith("Whether a normalization layer follows rpn.head.cls_logits, rpn.head.bbox_pred, roi_")
    assert len(lines) == 79


def test_by_default_it_warns_as_the_function_does(capsys):
    out = inspect(capsys, "torchvision:deeplabv3_resnet50")

    assert "61 of 61 convolutions standardized with layers='all'; left alone: none." in out
    assert "1 of the 61 convolutions standardized are followed by no normalization layer: classifier.4." in out
    assert "Order" not in out


def test_json_is_the_records(capsys):
    content = json.loads(inspect(capsys, "timm:efficientnet_b0", "--exclude", "*.se.*", "conv_head", "--json"))

    records = inspect_convolutions(build_named_model("timm:efficientnet_b0"), exclude=["*.se.*", "conv_head"])
    assert [entry["name"] for entry in content["convolutions"]] == [record.name for record in records]
    assert [entry["standardized"] for entry in content["convolutions"]] == [record.standardized for record in records]
    assert content["rules"]["exclude"] == ["*.se.*", "conv_head"]
    # 81 convolutions, two in each of 16 gates, one named
    assert content["summary"] == {"convolutions": 81, "standardized": 81 - 32 - 1, "normalized": 81 - 32}
    assert content["notes"] == []


def test_a_recipe_has_its_own_rules(capsys):
    out = inspect(capsys, "quickstart", "algorithms.WeightStandardization.exclude=[module.layer1, module.conv1]")

    assert "6 of 9 convolutions standardized with layers='all', exclude=['module.layer1', 'module.conv1']" in out
    assert (
        "module.conv1 (exclude='module.conv1'); module.layer1.0.conv1, module.layer1.0.conv2 (exclude='module.layer1')"
        in out
    )


def test_a_rule_on_the_command_line_takes_the_place_of_the_recipes(capsys):
    out = inspect(
        capsys, "quickstart", "algorithms.WeightStandardization.exclude=module.conv1", "--exclude", "module.layer1"
    )

    assert "7 of 9 convolutions standardized with layers='all', exclude=['module.layer1']" in out


@pytest.mark.parametrize(
    "algorithms, note",
    [
        ("null", "The recipe has no WeightStandardization; this is what its defaults would do."),
        ("{WeightStandardization: {}, BlurPool: {}}", "This is the model as it is built, before BlurPool"),
    ],
)
def test_what_a_recipe_may_make_different(algorithms, note, capsys):
    assert note in inspect(capsys, "quickstart", f"algorithms={algorithms}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["torchvision:resnet51"], "torchvision has no model 'resnet51'"),
        (["quickstrat"], "neither a file nor the name of a shipped recipe. Did you mean quickstart?"),
        (["torchvision:resnet18", "--exclude", "lyaer1"], "`exclude` has 'lyaer1', which matches none of the 20"),
        (["torchvision:resnet18", "--layers", "normed"], "`layers` (='normed') must be one of 'all', 'normalized'"),
        (["torchvision:resnet18", "--n-last-layers-ignore", "-1"], "`n_last_layers_ignore` (=-1)"),
        (["torchvision:resnet18", "seed=1"], "'seed=1' would change a recipe"),
        (["quickstart", "sede=1"], "`sede`"),
    ],
)
def test_mistakes_are_one_line_each(arguments, message, capsys):
    assert main(["inspect", *arguments]) == 2

    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"{arguments[0]}: 1 mistake\n") and len(error.splitlines()) == 2


@pytest.mark.parametrize(
    "rules, message",
    [
        ("exclude=modul.conv1", "`exclude` has 'modul.conv1', which matches none of the 9 convolutions"),
        ("layers=normed", "`algorithms.WeightStandardization.layers`"),
        ("include=[]", "`include` (=[]) must name at least one layer"),
    ],
)
def test_rules_that_do_not_fit_are_found_by_a_dry_run(rules, message, capsys):
    assert main(["train", "quickstart", "--dry-run", f"algorithms.WeightStandardization.{rules}"]) == 2

    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 2


def test_names_after_other_surgery_are_not_judged_by_a_dry_run():
    algorithms = "algorithms={BlurPool: {}, WeightStandardization: {exclude: module.layer2.0.conv1.conv}}"

    assert main(["train", "quickstart", "--dry-run", algorithms]) == 0
