"""What metrics come with besides their numbers: a table of their own, and a file of what was found in each image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from composer import Trainer
from composer.core import DataSpec

from ws_algorithm.recipes.schema import RecipeError


class Evaluation(Protocol):
    """What a metric may have as ``evaluation``; those of a model share one. All processes call its methods alike.

    Attributes:
        results_name: The file or folder of results in the folder of a run, listed in ``run_folder.RESULTS``.
    """

    results_name: str

    def table(self, published: Mapping[str, float]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows to be printed after the evaluation, with the figures that were published by metric."""
        ...

    def begin_results(self, path: Path, dataset: Any) -> None:
        """Be told before the evaluation that results are wanted.

        Raises:
            ValueError: If the data set does not say what they need.
        """
        ...

    def write_results(self) -> str:
        """Write them after the evaluation, each image once, and return what has been written in words."""
        ...


def evaluation_of(trainer: Trainer) -> Evaluation | None:
    """What the metrics of a Trainer have as ``evaluation``, if any has it."""
    metrics: list[Any] = [metric for own in trainer.state.eval_metrics.values() for metric in own.values()]
    return next((metric.evaluation for metric in metrics if getattr(metric, "evaluation", None) is not None), None)


class ResultFile:
    """Where the results of an evaluation go, checked before it begins.

    Args:
        source: What mistakes are said to be in.
        evaluation: What writes them, if the metrics have it.
        output: Where the user wants them, if anywhere; nothing may be there yet.
        folder: Of the run, where they go otherwise and replace those of an earlier evaluation of the same run.

    Raises:
        RecipeError: If `output` is there already or has no folder, or there is nothing to write there.

    Attributes:
        line: What has been written where; ``None`` if there was nothing to write.
    """

    def __init__(self, source: str, evaluation: Evaluation | None, output: str | None, folder: Path | None) -> None:
        self.source, self.evaluation, self.line = source, evaluation, None
        self.path: Path | None = None
        if output is not None:
            self.path = Path(output).expanduser()
            self._refuse_if(evaluation is None, "the metrics of this model write no results. Leave --output out.")
            self._refuse_if(self.path.exists(), "is there already. Name another file, or remove it first.")
            self._refuse_if(not self.path.parent.is_dir(), "is to be in a folder that is not there. Make it first.")
        elif evaluation is not None and folder is not None:
            self.path = folder / evaluation.results_name
        if self.path is not None:
            self._refuse_if(
                not os.access(self.path.parent, os.W_OK), "cannot be written there. Name another with --output."
            )

    def begin(self, data: DataSpec | None) -> None:
        """To be called before the evaluation.

        Raises:
            RecipeError: If the data do not say what results need.
        """
        if self.path is not None and self.evaluation is not None:
            try:
                self.evaluation.begin_results(self.path, getattr(data and data.dataloader, "dataset", None))
            except ValueError as error:
                raise RecipeError(self.source, [f"results of the evaluation: {error}"]) from error

    def write(self) -> None:
        """To be called after the evaluation, by all processes.

        Raises:
            RecipeError: If the file cannot be written.
        """
        if self.evaluation is None:
            return
        if self.path is None:
            self.line = "not written; --output FILE writes them"
            return
        try:
            self.line = f"{self.path} ({self.evaluation.write_results()})"
        except OSError as error:
            raise RecipeError(self.source, [f"`--output` (={str(self.path)!r}): {error}."]) from error

    def _refuse_if(self, is_wrong: bool, reason: str) -> None:
        if is_wrong:
            raise RecipeError(self.source, [f"`--output` (={str(self.path)!r}): {reason}"])
