"""Standardized models, folded or not, through the ways in which models leave PyTorch."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from composer.functional import apply_weight_standardization as composers_apply
from composer.models import ComposerClassifier
from composer.utils.inference import export_for_inference
from torch import nn

from ws_algorithm import apply_weight_standardization, folded_copy, is_weight_standardized

# Of torch's and of formula.py's checks of shapes, which are the same for all images
TRACING = "ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning"
ONNX_EXPORTER = "ignore:The feature will be removed:DeprecationWarning"  # torch's own, about itself


def network() -> nn.Module:
    torch.manual_seed(0)
    block = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU()]
    head = [nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*block, *head, nn.Linear(8, 5)).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Standardized; to look at, not to change."""
    standardized = network()
    apply_weight_standardization(standardized)
    return standardized


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def through_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(outputs)


def check_close(outputs: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((outputs - expected).abs().max()) <= 1e-5 * float(expected.abs().max())  # the promise of the export


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("folded", [False, True], ids=["standardized", "folded"])
def test_torch_export(model, images, folded, strict):
    exported: Any = torch.export.export(folded_copy(model) if folded else model, (images,), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)

    check_close(torch.export.load(buffer).module()(images), model(images))


@pytest.mark.filterwarnings(TRACING)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_tracing_a_standardized_model(model, images, with_gradients):
    with torch.set_grad_enabled(with_gradients):
        traced: Any = torch.jit.trace(model, images)  # compares two traces

    more = torch.cat([images, images[:1]])
    check_close(traced(more), model(more))


def test_scripting_a_standardized_model_is_refused(model, images):
    with pytest.raises(ValueError, match=r"`torch.jit.script` cannot compile .* torch.jit.script\(ws_algorithm.folded"):
        torch.jit.script(model)

    check_close(torch.jit.script(folded_copy(model))(images), model(images))


def test_the_built_in_of_composer_writes_torchscript_that_raises(tmp_path, images):
    """Why Composer's export needs our transform: scripting and saving succeed."""
    standardized = network()
    composers_apply(standardized)
    export_for_inference(standardized, "torchscript", str(tmp_path / "model.pt"), sample_input=(images,))

    with pytest.raises(Exception, match="Parametrization is not working with scripting"):
        torch.jit.load(str(tmp_path / "model.pt"))(images)


def test_composers_export_to_torchscript_with_our_transform(tmp_path, images):
    classifier = ComposerClassifier(network(), num_classes=5)
    apply_weight_standardization(classifier)

    path = str(tmp_path / "model.pt")
    export_for_inference(classifier.module, "torchscript", path, transforms=[folded_copy])

    check_close(torch.jit.load(path)(images), classifier.module(images))
    assert is_weight_standardized(classifier)


@pytest.mark.filterwarnings(TRACING, ONNX_EXPORTER)
def test_composers_export_to_onnx_with_our_transform(tmp_path, model, images):
    path = tmp_path / "model.onnx"
    axes = {"input": {0: "batch"}, "output": {0: "batch"}}
    export_for_inference(model, "onnx", str(path), sample_input=(images,), dynamic_axes=axes, transforms=[folded_copy])

    check_close(through_onnx(path, images[:1]), model(images[:1]))


@pytest.mark.filterwarnings(TRACING, ONNX_EXPORTER)
def test_the_graph_of_a_folded_model_is_that_of_one_that_was_never_standardized(tmp_path, model, images):
    operations = []
    for name, exported in (("never", network()), ("folded", folded_copy(model)), ("standardized", model)):
        torch.onnx.export(exported, (images,), str(tmp_path / name), dynamo=False)
        graph = onnx.load(str(tmp_path / name)).graph
        operations.append(Counter(node.op_type for node in graph.node))
    never, folded, standardized = operations

    assert folded == never
    assert standardized["LayerNormalization"] == 2 and never["LayerNormalization"] == 0  # one for each convolution
