from typing import Any

import pytest
import torch
from torch import nn

from ws_algorithm import apply_weight_standardization
from ws_algorithm.recipes import registry
from ws_algorithm.recipes.classifier import ImageClassifier

from .small_detectors import BUILDERS as DETECTORS
from .small_networks import NAMES_AND_NORMS, NETWORKS, NORMS, count, parameters


def build(name: str, norm: str = "group", **arguments: Any) -> ImageClassifier:
    return registry.MODELS[name](num_classes=7, norm=norm, **NETWORKS[name], **arguments)


def test_every_builder_is_tested():
    assert NETWORKS.keys() | DETECTORS.keys() == registry.MODELS.keys()


@pytest.mark.parametrize(("name", "norm"), NAMES_AND_NORMS)
def test_gradients_reach_the_image_and_every_parameter(name, norm):
    model = build(name, norm)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    batch = (images, torch.tensor([0, 1, 2, 6]))

    outputs = model(batch)
    model.loss(outputs, batch).backward()

    assert outputs.shape == (4, 7)
    assert outputs.isfinite().all()
    assert images.grad is not None and (images.grad != 0).flatten(1).any(dim=1).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # a bias before a norm moves nothing, but every weight does
        assert parameter.ndim == 1 or (parameter.grad != 0).any(), key


@pytest.mark.parametrize(("name", "norm"), NAMES_AND_NORMS)
def test_one_image_does_not_see_another_unless_with_batch_norm(name, norm):
    model = build(name, norm).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    with torch.no_grad():
        together, alone = model((images, None)), model((images[:2], None))

    assert torch.allclose(together[:2], alone) == (norm != "batch")


@pytest.mark.parametrize(("name", "norm"), NAMES_AND_NORMS)
def test_all_norms_are_of_the_chosen_kind(name, norm):
    with torch.device("meta"):
        model = build(name, norm)

    kinds = {kind for kind in (*NORMS.values(), nn.InstanceNorm2d, nn.LayerNorm) if count(model, kind)}
    assert kinds == ({NORMS[norm]} if norm in NORMS else set())


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_differ_in_no_parameter_but_those_that_are_frozen(name):
    with torch.device("meta"):
        batch, group, frozen = (build(name, norm) for norm in ("batch", "group", "frozen"))
    scales_and_shifts = 2 * sum(module.num_features for module in batch.modules() if isinstance(module, nn.BatchNorm2d))

    assert [key for key, _ in batch.named_parameters()] == [key for key, _ in group.named_parameters()]
    assert parameters(batch) == parameters(group) == parameters(frozen) + scales_and_shifts


@pytest.mark.parametrize("name", NETWORKS)
def test_building_on_the_meta_device_takes_no_memory(name):
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = build(name)

    assert torch.equal(torch.get_rng_state(), state)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == {
        key: tensor.shape for key, tensor in build(name).state_dict().items()
    }


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "imagenet_resnet"])
def test_gray_images(name):
    model = build(name, in_channels=1)

    with torch.no_grad():
        assert model((torch.randn(2, 1, 32, 32), None)).shape == (2, 7)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_group_norm_has_the_number_of_groups(name):
    with torch.device("meta"):
        fours, pairs = build(name, num_groups=2), build(name, channels_per_group=2)

    assert {module.num_groups for module in fours.modules() if isinstance(module, nn.GroupNorm)} == {2}
    assert {
        module.num_channels // module.num_groups for module in pairs.modules() if isinstance(module, nn.GroupNorm)
    } == {2}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("argument", ["num_groups", "channels_per_group"])
def test_groups_that_do_not_divide_a_layer_are_refused(name, argument):
    groups: dict[str, Any] = {argument: 7}
    with torch.device("meta"), pytest.raises(ValueError, match=rf"^`{argument}` \(=7\) must divide the channels"):
        build(name, **groups)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_for_group_norm(name):
    with pytest.raises(ValueError, match=r"`num_groups` \(=8\) is for norm='group', and `norm` is 'batch'"):
        build(name, "batch", num_groups=8)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unknown_norm_is_refused(name):
    with pytest.raises(ValueError, match=r"`norm` \(='layer'\) must be 'batch', 'group'"):
        build(name, "layer")


@pytest.mark.parametrize("name", NETWORKS)
def test_fewer_than_two_classes_are_refused(name):
    with pytest.raises(ValueError, match=r"`num_classes` \(=1\) must be at least 2"):
        registry.MODELS[name](num_classes=1, **NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_come_from_a_file(name, tmp_path):
    norm, path = ("batch", str(tmp_path / "weights.pt"))
    saved = build(name, norm)
    torch.save(saved.module.state_dict(), path)

    loaded = build(name, norm, pretrained=path).state_dict()

    assert loaded.keys() == saved.state_dict().keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in saved.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_file_is_found_without_memory(name):
    with torch.device("meta"), pytest.raises(ValueError, match=r"`pretrained` \(='nowhere.pt'\) must be a file"):
        build(name, pretrained="nowhere.pt")


# The transitions of a DenseNet are followed by a pooling, and nothing in the published AlexNet by a norm
@pytest.mark.parametrize(("name", "others"), [(name, 2 if name == "cifar_densenet" else 0) for name in NETWORKS])
@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_before_a_norm_are_found(name, others, norm):
    with torch.device("meta"):
        model = build(name, norm)

    assert apply_weight_standardization(model, layers="normalized") == count(model, nn.Conv2d) - others > 0
