"""What a forward may take, and the ways in which a ``ComposerModel`` takes its batch apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import conv, is_sure, look, norm, norms, warnings_about
from tensor_following import follow
from torch import nn
from torch.nn import functional as F

from tracing.cautious import is_found_or_missed_aloud


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem, self.norm = conv(), conv(), norm()

    def go(self, image: Any) -> Any:
        return self.head(self.norm(self.stem(image)))


class One(Images):
    def forward(self, image: Any) -> Any:
        return self.go(image)


class KeywordOnly(Images):
    def forward(self, *, image: Any) -> Any:
        return self.go(image)


class Defaults(Images):
    def forward(self, image: Any, mask: Any = None, scale: float = 2.0) -> Any:
        image = self.go(image) * scale
        return image if mask is None else image * mask


class NestedBatch(Images):
    def forward(self, batch: Any) -> Any:
        return self.go(batch["inputs"][0])


class Unpacked(Images):
    def forward(self, batch: Any) -> Any:
        image, _ = batch
        return self.go(image)


@pytest.mark.parametrize("cls", [One, KeywordOnly, Defaults, NestedBatch, Unpacked])
def test_inputs_that_stand_for_themselves(cls):
    model = cls()

    assert norms(model) == {"stem": "norm", "head": None}
    assert is_sure(model)


class Positional(Images):
    def forward(self, *images: Any) -> Any:
        return self.go(images[0])


class TwoPositional(Images):
    def forward(self, *images: Any) -> Any:
        return self.go(images[0] + images[1])


class Keywords(Images):
    def forward(self, **batch: Any) -> Any:
        return self.go(batch["image"])


class OptionalImage(Images):
    def forward(self, image: Any = None) -> Any:
        return self.go(image)


class RequiredDefaults(Images):
    def forward(self, image: Any = None) -> Any:
        if image is None:
            raise ValueError("image is required")
        return self.go(image)


class Dictionary(Images):
    def forward(self, batch: Any) -> Any:
        return {name: self.go(image) for name, image in batch.items()}


class Attributes(Images):
    def forward(self, batch: Any) -> Any:
        return self.go(batch.image)


class EitherKind(Images):
    def forward(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self.go(batch["image"])
        image = batch[0] if isinstance(batch, (list, tuple)) else batch
        return self.go(image)


@pytest.mark.parametrize(
    "cls",
    [Positional, TwoPositional, Keywords, OptionalImage, RequiredDefaults, Dictionary, Attributes, EitherKind],
)
def test_inputs_of_any_kind(cls):
    assert is_found_or_missed_aloud(cls(), {"stem": "norm", "head": None})


class Network(nn.Module):
    """Its layers are defined in reverse."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.second, self.body, self.first, self.stem = conv(), norm(), conv(), norm(), conv()

    def forward(self, image: Any) -> Any:
        return self.head(self.second(self.body(self.first(self.stem(image)))))


class Composed(nn.Module):
    """A network, and a forward like that of a ``ComposerModel``, which takes a batch."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.module = Network()
        self.run = run

    def forward(self, batch: Any) -> Any:
        return self.run(self, batch)


def unpacks(m: Any, batch: Any) -> Any:
    x, _ = batch
    return m.module(x)


def unpacks_the_first(m: Any, batch: Any) -> Any:
    x, *rest = batch
    return m.module(x), rest


def looks_up(m: Any, batch: Any) -> Any:
    return m.module(batch["image"])


def asks_for_a_dictionary(m: Any, batch: Any) -> Any:
    return m.module(batch["image"] if isinstance(batch, dict) else batch[0])


def asks_for_a_key(m: Any, batch: Any) -> Any:
    return m.module(batch["image"]) if "image" in batch else None


def asks_for_a_length(m: Any, batch: Any) -> Any:
    return m.module(batch[0] if len(batch) == 2 else batch)


def asserts_dimensions(m: Any, x: Any) -> Any:
    assert x.ndim == 4
    return m.module(x)


def asks_for_one_image(m: Any, x: Any) -> Any:
    if x.shape[0] == 1:
        x = x.repeat(2, 1, 1, 1)
    return m.module(x)


def logs_a_mean(m: Any, x: Any) -> Any:
    output = m.module(x)
    m.logged = float(output.mean())
    return output


def passes_keywords(m: Any, batch: Any) -> Any:
    return m.module(**batch)


def enlarges(m: Any, x: Any) -> Any:
    size = int(x.shape[-2] * 2), int(x.shape[-1] * 2)
    return m.module(F.interpolate(x, size=size))


def takes_images_one_by_one(m: Any, batch: Any) -> Any:
    return [m.module(image[None]) for image in batch]


def moves_a_batch(m: Any, batch: Any) -> Any:
    batch = {name: value.float() for name, value in batch.items()}
    return m.module(batch["image"])


IMAGE = torch.linspace(0, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)
PAIR, NAMED = [IMAGE, torch.tensor([0, 1])], {"image": IMAGE}

IDIOMS: dict[Callable[[Any, Any], Any], Any] = {
    **dict.fromkeys((unpacks, unpacks_the_first, asks_for_a_length), PAIR),
    **dict.fromkeys((looks_up, asks_for_a_dictionary, asks_for_a_key, passes_keywords, moves_a_batch), NAMED),
    **dict.fromkeys((asserts_dimensions, asks_for_one_image, logs_a_mean, enlarges, takes_images_one_by_one), IMAGE),
}


@pytest.mark.parametrize("run", IDIOMS)
def test_the_head_of_a_composer_model_is_left_alone(run):
    """Of a network that is traced by itself, if its wrapper is not: without a warning."""
    model = Composed(run)
    followed = follow(model.eval(), IDIOMS[run])

    selection = look(model, n=1, layers="all")

    assert [choice.name for choice in selection.choices] == followed.order
    assert followed.order == ["module.stem", "module.body", "module.head"]
    assert [choice.name for choice in selection.chosen] == ["module.stem", "module.body"]
    assert warnings_about(model, n=1, layers="all") == ""


@pytest.mark.parametrize("run", IDIOMS)
def test_norms_inside_of_a_composer_model_are_found(run):
    """What follows the head is known only if the wrapper is traced."""
    model = Composed(run)
    head = {choice.name: choice.place for choice in look(model).choices}["module.head"]

    assert norms(model) == {"module.stem": "module.first", "module.body": "module.second", "module.head": None}
    assert head.undecided is not is_sure(model)


@pytest.mark.parametrize("run", IDIOMS)
def test_a_composer_model_is_observed_with_a_batch(run):
    model = Composed(run)

    assert norms(model, (IDIOMS[run],)) == {
        "module.stem": "module.first",
        "module.body": "module.second",
        "module.head": None,
    }
    assert is_sure(model, (IDIOMS[run],))
