"""What a model predicts of an image, for people to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from composer.core import DataSpec
from PIL import Image
from torch import Tensor

from ws_algorithm.recipes.drawing import draw_objects
from ws_algorithm.recipes.report import format_table

_MOST = 5  # classes in a table


@dataclass
class Classes:
    """The names of classes.

    Args:
        names: As the data set has them.
        first: The label of the first one: 1 where 0 is the background.
    """

    names: list[str]
    first: int

    @classmethod
    def of(cls, data: DataSpec) -> Classes:
        """Those of a data set: its ``classes``, and ``num_outputs`` if there are more labels than those."""
        dataset: Any = getattr(data.dataloader, "dataset", None)
        names = [str(name) for name in getattr(dataset, "classes", None) or ()]
        return cls(names, getattr(dataset, "num_outputs", len(names)) - len(names))

    def name(self, label: int) -> str:
        """The name of a label, or its number."""
        position = label - self.first
        return self.names[position] if 0 <= position < len(self.names) else str(label)


@dataclass
class Shown:
    """A line, a table if there is one, and a picture if there is something to draw."""

    summary: str
    table: str | None = None
    picture: Image.Image | None = None


def show(prediction: dict[str, Tensor], image: Image.Image, classes: Classes) -> Shown:
    """What a prediction says.

    Args:
        prediction: What ``model.predict`` returns for an image. Either objects: ``boxes (N, 4)`` as corners in pixels,
            ``labels (N,)``, ``scores (N,)`` and perhaps ``masks (N, H, W)`` of bools; or ``probabilities (C,)`` of the
            classes.
        image: In RGB.
        classes: Their names.

    Raises:
        ValueError: If there is neither.
    """
    if "boxes" in prediction:
        return _objects(prediction, image, classes)
    if "probabilities" in prediction:
        return _most_probable(prediction["probabilities"], classes)
    raise ValueError(f"`prediction` has nothing that can be shown, only {sorted(prediction)}.")


def _objects(prediction: dict[str, Tensor], image: Image.Image, classes: Classes) -> Shown:
    names = [classes.name(label) for label in prediction["labels"].tolist()]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, prediction["scores"].tolist(), strict=True)]
    counts = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
    noun = "object" if len(names) == 1 else "objects"
    picture = draw_objects(image, prediction["boxes"], texts, prediction.get("masks"))
    return Shown(f"{len(names)} {noun}{f' ({counts})' if counts else ''}", picture=picture)


def _most_probable(probabilities: Tensor, classes: Classes) -> Shown:
    best = probabilities.topk(min(_MOST, len(probabilities)))
    rows: list[tuple[str, ...]] = [
        (classes.name(label), f"{value:.4f}")
        for label, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return Shown(rows[0][0], format_table(("class", "probability"), rows))
