"""What a forward may take: symbols stand for tensors, batches and keywords alike."""

from typing import Any

import pytest
from looked_at import conv, is_sure, norm, norms
from torch import nn


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem, self.norm = conv(), conv(), norm()

    def go(self, image: Any) -> Any:
        return self.head(self.norm(self.stem(image)))


class Positional(Images):
    def forward(self, *images: Any) -> Any:
        return self.go(images[0])


class TwoPositional(Images):
    def forward(self, *images: Any) -> Any:
        return self.go(images[0] + images[1])


class Keywords(Images):
    def forward(self, **batch: Any) -> Any:
        return self.go(batch["image"])


class KeywordOnly(Images):
    def forward(self, *, image: Any) -> Any:
        return self.go(image)


class Defaults(Images):
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


INPUTS = [
    *(Positional, TwoPositional, Keywords, KeywordOnly, Defaults, RequiredDefaults, Dictionary, Attributes),
    EitherKind,
]


@pytest.mark.parametrize("cls", INPUTS)
def test_kinds_of_input(cls):
    """The order, or at least that it is not known."""
    model = cls()

    assert norms(model) == {"stem": "norm", "head": None} or not is_sure(model)
