import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from ws_algorithm import apply_weight_standardization, remove_weight_standardization
from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet
from ws_algorithm.recipes.norm_layers import Norm
from ws_algorithm.recipes.pretrained import load_pretrained

PATH = "weights.pt"  # every test has a folder of its own
ANOTHER_NETWORK = "The file is of another network: compare the name, the arch or depth, and the widths."


def network(
    num_classes: int = 5, width: int = 8, norm: Norm = "group", pretrained: str | None = None, depth: int = 8
) -> nn.Module:
    return build_cifar_resnet(num_classes, depth, width, norm=norm, pretrained=pretrained).module


def saved(wrap: Callable[[dict[str, Tensor]], Any] = dict, **arguments: Any) -> nn.Module:
    source = network(**arguments)
    for buffer in source.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # statistics unlike those at the start
    torch.save(wrap(source.state_dict()), PATH)
    return source


def same(first: nn.Module, second: nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in first.state_dict().items() if key not in but)


def refusal(target: nn.Module, path: str = PATH) -> str:
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_pretrained(target, path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())  # nothing half done
    with pytest.raises(ValueError) as unfilled:
        load_pretrained(copy.deepcopy(target).to("meta"), path)
    assert str(unfilled.value) == str(caught.value)  # so that checking a recipe finds it too
    assert f"`pretrained` (={path!r}) must " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        lambda state: {"state_dict": state, "epoch": 90, "acc": 76.28},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}, "optimizer": {}},
    ],
    ids=["plain", "state_dict", "model", "module.", "state_dict and module."],
)
@pytest.mark.parametrize("norm", ["group", "batch", "frozen"])
def test_a_file_in_every_form(wrap, norm):
    source = saved(wrap, norm=norm)

    assert same(source, network(norm=norm, pretrained=PATH))


def test_a_whole_classifier_is_a_network_too():
    source = network()
    torch.save(ImageClassifier(source, 5).state_dict(), PATH)

    assert same(source, network(pretrained=PATH))


def test_batch_norm_can_be_frozen_but_not_thawed_into_groups():
    source = saved(norm="batch")
    frozen = network(norm="frozen", pretrained=PATH)

    assert same(frozen, source)
    assert torch.equal(frozen.get_buffer("bn1.running_var"), source.get_buffer("bn1.running_var"))
    message = refusal(network(norm="group"))
    # nine norms, the stem's, six in blocks and two on shortcuts, have two statistics each
    assert "Unexpected: 'bn1.running_mean', 'bn1.running_var', 'layer1.0.bn1.running_mean' and 15 more" in message
    assert message.endswith("build with `norm` 'batch' or 'frozen'.")


def test_frozen_statistics_become_batch_norms_own():
    source = saved(norm="frozen")

    assert same(source, network(norm="batch", pretrained=PATH))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_group_norm_has_no_statistics_to_give(norm):
    saved(norm="group")

    message = refusal(network(norm=norm))

    assert "Missing: 'bn1.running_mean', 'bn1.running_var'" in message
    assert message.endswith("build with `norm` 'group'.")


def test_a_classifier_of_other_classes_starts_anew(caplog):
    source = saved(num_classes=9)
    target = network(num_classes=5)
    head = {key: tensor.clone() for key, tensor in target.state_dict().items() if key.startswith("fc.")}

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        load_pretrained(target, PATH)

    (record,) = caplog.records
    assert "has 9 classes and the network 5: fc.weight and fc.bias start anew" in record.getMessage()
    assert same(target, source, but=("fc.weight", "fc.bias"))
    assert all(torch.equal(tensor, target.state_dict()[key]) for key, tensor in head.items())


def test_a_classifier_of_the_same_classes_is_loaded_without_a_word(caplog):
    source = saved()

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        assert same(network(pretrained=PATH), source)
    assert caplog.records == []


def test_other_shapes_are_refused_even_in_the_classifier(caplog):
    saved(num_classes=9, width=16)

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        message = refusal(network())

    assert caplog.records == []
    assert "Of another shape: 'conv1.weight' (16, 3, 3, 3) instead of (8, 3, 3, 3), 'bn1.weight' (16,)" in message
    assert message.endswith(ANOTHER_NETWORK)


@pytest.mark.parametrize("norm", ["group", "batch", "frozen"])
@pytest.mark.parametrize(("depth", "other", "first"), [(14, 8, "Missing"), (8, 14, "Unexpected")])
def test_another_depth_is_not_taken_for_another_norm(depth, other, first, norm):
    saved(depth=other, norm=norm)

    message = refusal(network(depth=depth, norm=norm))

    assert f"{first}: 'layer1.1.conv1.weight', " in message
    assert message.endswith(ANOTHER_NETWORK)


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_another_norm_is_named_before_another_depth(depth):
    saved(depth=14, norm="batch")
    assert refusal(network(depth=depth)).endswith("build with `norm` 'batch' or 'frozen'.")

    saved(depth=14, norm="group")
    assert refusal(network(depth=depth, norm="batch")).endswith("build with `norm` 'group'.")


def test_a_file_without_classifier_is_refused():
    saved(lambda state: {key: tensor for key, tensor in state.items() if not key.startswith("fc.")})

    assert "Missing: 'fc.weight', 'fc.bias'. " in refusal(network())


@pytest.mark.parametrize("classes", [5, 9])
def test_a_backbone_takes_a_file_with_a_classifier_or_without(classes):
    source, backbone = saved(num_classes=classes), network()
    backbone.fc = nn.Identity()

    load_pretrained(backbone, PATH, dropped=["fc"])
    assert same(backbone, source)

    torch.save(backbone.state_dict(), PATH)
    load_pretrained(backbone, PATH, dropped=["fc"])


def test_only_whole_names_are_dropped():
    saved(lambda state: state | {"fc2.weight": torch.zeros(1)})
    backbone = network()
    backbone.fc = nn.Identity()

    with pytest.raises(ValueError, match="Unexpected: 'fc2.weight'"):
        load_pretrained(backbone, PATH, dropped=["fc"])


def test_missing_and_unexpected_keys_are_named_together():
    saved(lambda state: {key.replace("layer3", "stage3"): tensor for key, tensor in state.items()})

    message = refusal(network())

    # nine tensors: three convolutions, and scale and shift of their norms
    assert "Missing: 'layer3.0.conv1.weight', 'layer3.0.bn1.weight', 'layer3.0.bn1.bias' and 6 more; " in message
    assert "Unexpected: 'stage3.0.conv1.weight', " in message


def test_a_parametrized_model_is_saved_again_without():
    source = network()
    apply_weight_standardization(source)
    torch.save(source.state_dict(), PATH)

    assert "call remove_weight_standardization on it" in refusal(network())
    remove_weight_standardization(source)
    torch.save(source.state_dict(), PATH)
    assert same(source, network(pretrained=PATH))


def test_a_file_that_is_not_there_is_refused():
    Path("folder").mkdir()

    for path in ("nowhere.pt", "folder"):
        assert "must be a file, and there is none" in refusal(network(), path)


# What the unpickler makes of text: KeyError, IndexError, struct.error, UnpicklingError
TEXTS = [b"hello world\n", b"run_name: resnet\nseed: 17\n", b"seed: 17\n", b"j", b"model:\n  name: cifar_resnet\n"]


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off", *TEXTS])
def test_a_file_that_torch_cannot_read_is_refused(content):
    Path(PATH).write_bytes(content)

    message = refusal(network())

    assert "must be a file of tensors saved by torch.save, and it is not: " in message
    assert message.endswith("Save the state dict alone.")


def test_a_file_that_the_disk_refuses_is_not_taken_for_another_format(monkeypatch):
    saved()
    monkeypatch.setattr(torch, "load", Mock(side_effect=PermissionError(13, "Permission denied", PATH)))

    with pytest.raises(PermissionError, match=f"Permission denied: '{PATH}'"):
        network(pretrained=PATH)


@pytest.mark.parametrize("content", [{}, [torch.ones(2)], {"epoch": 3}, {"state": {"model": {}}}, torch.ones(2)])
def test_a_file_without_a_state_dict_is_refused(content):
    torch.save(content, PATH)

    assert "must hold a state dict" in refusal(network())


def test_a_pickled_model_is_not_executed():
    torch.save(network(), PATH)

    assert "Save the state dict alone" in refusal(network())


@pytest.mark.parametrize("norm", ["group", "batch", "frozen"])
@pytest.mark.parametrize("num_classes", [5, 9])
def test_on_the_meta_device_a_file_that_fits_fills_nothing(num_classes, norm, caplog):
    saved(num_classes=num_classes, norm=norm)

    with caplog.at_level(logging.INFO, "ws_algorithm"), torch.device("meta"):
        checked = network(norm=norm, pretrained=PATH)

    assert {tensor.device.type for tensor in checked.state_dict().values()} == {"meta"}
    assert caplog.records == []  # a head that starts anew is for the log of the run


def test_on_the_meta_device_the_first_mistake_is_found_while_building():
    saved(depth=14)

    with torch.device("meta"):
        with pytest.raises(ValueError, match="must be a file, and there is none"):
            network(pretrained="nowhere.pt")
        with pytest.raises(ValueError, match=ANOTHER_NETWORK):
            network(pretrained=PATH)


def test_a_file_of_2019_loads():
    source = network()
    torch.save(source.state_dict(), PATH, _use_new_zipfile_serialization=False)  # the default until torch 1.6

    assert same(source, network(pretrained=PATH))
    with torch.device("meta"):
        assert next(network(pretrained=PATH).parameters()).is_meta


def test_a_network_without_classifier_has_no_other_classes():
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), PATH)

    assert "Of another shape: 'weight'" in refusal(nn.Conv2d(3, 4, 3))


def test_half_precision_is_widened():
    source = saved(lambda state: {key: tensor.half() for key, tensor in state.items()})

    loaded = network(pretrained=PATH)

    assert torch.equal(loaded.get_parameter("conv1.weight"), source.get_parameter("conv1.weight").half().float())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
