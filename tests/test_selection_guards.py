"""What stands in the way of standardizing a convolution is refused before anything has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import conv, norm
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvBn2d
from torch.ao.nn.qat import Conv2d as QATConv2d
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from ws_algorithm import apply_weight_standardization, inspect_convolutions, is_weight_standardized
from ws_algorithm.formula import FORMULAS


def pruned() -> Any:
    return prune.l1_unstructured(conv(), "weight", 0.5)


def qat(cls: Any = QATConv2d) -> Any:
    return cls(2, 2, 3, padding=1, qconfig=get_default_qat_qconfig("fbgemm"))


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.half()


def half_by_parametrization() -> Any:
    return parametrize.register_parametrization(conv(), "weight", Halved(), unsafe=True)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.LazyConv2d(2, 3, padding=1), "lazy.*Run one batch"),
    "pruned": (pruned, "computed by a hook.*prune.remove"),
    "old weight_norm": (lambda: weight_norm(conv()), "computed by a hook.*remove_weight_norm"),
    "old spectral_norm": (lambda: spectral_norm(conv()), "computed by a hook.*remove_spectral_norm"),
    "weight_norm": (lambda: parametrizations.weight_norm(conv()), "weight_norm, whose effect"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(conv()), "spectral_norm, whose effect"),
    "orthogonal": (lambda: parametrizations.orthogonal(conv()), "orthogonal, whose effect"),
    "quantization": (qat, "quantization-aware"),
    "quantization with norm": (lambda: qat(ConvBn2d), "quantization-aware"),
    "integers": (lambda: integers(), "`weight`"),
}


def integers() -> Any:
    layer = conv()
    layer.weight = nn.Parameter(torch.ones(2, 2, 3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [(name, type(layer)) for name, layer in model.named_modules()],
        "objects": [(name, id(value)) for layer in model.modules() for name, value in vars(layer).items()],
        "parameters": [(name, id(p), p._version) for name, p in model.named_parameters(remove_duplicate=False)],
        "keys": list(model.state_dict(keep_vars=True)),
        "hooks": [list(layer._forward_pre_hooks) + list(layer._forward_hooks) for layer in model.modules()],
        "training": [layer.training for layer in model.modules()],
    }


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_refused(kind):
    build, message = REFUSED[kind]
    model = nn.Sequential(conv(), norm(), build(), norm(), conv(), norm())
    before = everything(model)

    complaint = f"convolution, '2', that cannot be standardized: .*{message}.*exclude='2'"
    with pytest.raises(ValueError, match=complaint):
        apply_weight_standardization(model)
    assert everything(model) == before

    record = next(record for record in inspect_convolutions(model) if record.name == "2")
    assert not record.standardized
    assert record.reason.startswith("cannot be: ")
    assert everything(model) == before

    assert apply_weight_standardization(model, exclude="2") == 2
    assert not is_weight_standardized(model[2])


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("rules", [{"n_last_layers_ignore": 1}, {"layers": "normalized"}, {"include": "0"}])
def test_not_refused_if_not_chosen(kind, rules):
    model = nn.Sequential(conv(), norm(), nn.ReLU(), REFUSED[kind][0]())

    assert apply_weight_standardization(model, **rules) == 1


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_how_many_more():
    model = nn.Sequential(nn.LazyConv2d(2, 3), pruned(), pruned())

    with pytest.raises(ValueError, match=r"'0', that .*lazy.*exclude='0'.*\(2 more like it\)"):
        apply_weight_standardization(model)


def test_a_model_that_is_refused_itself():
    """Its name is empty; a remedy that names it would be none."""
    with pytest.raises(ValueError, match="the model itself"):
        apply_weight_standardization(pruned())


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_fan_in_of_one_is_skipped(formula, cls):
    model = nn.Sequential(cls(4, 4, 1, groups=4), cls(1, 4, 1), cls(4, 4, 1))

    assert apply_weight_standardization(model, formula=formula) == 1
    assert is_weight_standardized(model[2])


def test_a_fan_in_of_one_under_another_parametrization():
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    depthwise = nn.Conv2d(2, 2, 1, groups=2)
    parametrize.register_parametrization(depthwise, "weight", Doubled())

    assert apply_weight_standardization(nn.Sequential(depthwise, conv())) == 1


def test_a_formula_that_is_not_known_changes_nothing():
    model = nn.Sequential(conv(), norm())
    before = everything(model)

    with pytest.raises(ValueError, match="formula"):
        apply_weight_standardization(model, formula="papers")

    assert everything(model) == before


def test_an_example_input_that_does_not_fit_changes_nothing():
    class Only(nn.Sequential):
        def forward(self, input: Any) -> Any:
            if type(input) is not torch.Tensor:
                raise TypeError("only for tensors")
            return super().forward(input)

    model = Only(conv(), norm())
    before = everything(model)

    with pytest.raises(ValueError, match="`example_input` does not fit Only"):
        apply_weight_standardization(model, 1, example_input=torch.ones(1, 5, 4, 4))

    assert everything(model) == before
