"""What to tell the user about a selection: one line on what was done, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ws_algorithm.formula import Formula
from ws_algorithm.layers import raw_weight, standardizers_of
from ws_algorithm.selection import ConvolutionChoice, Selection


def summary_of(selection: Selection) -> str:
    """How many convolutions were standardized, and which were not, by reason."""
    reasons: dict[str, list[ConvolutionChoice]] = {}
    for choice in selection.choices:
        if choice.skipped_because is not None:
            reasons.setdefault(choice.skipped_because, []).append(choice)
    return (
        f"Weight Standardization: {len(selection.chosen)} of {len(selection.choices)} convolutions of "
        f"{type(selection.module).__name__} standardized; left alone: "
        f"{'; '.join(f'{_listed(choices)} ({reason})' for reason, choices in reasons.items()) or 'none'}."
    )


def cautions_about(selection: Selection, formula: Formula) -> Iterator[str]:
    """Sentences, each of which names layers and a remedy; none if all is well."""
    yield from _order_in_doubt(selection)
    yield from _seen_in_one_mode(selection)
    if formula.rescaling is None:  # gain and shift keep the outputs as large as they should be
        yield from _followed_by_no_norm(selection)
    yield from _not_traced(selection, formula)
    yield from _shared_weights(selection)
    yield from _unused(selection)
    if small := [choice for choice in selection.accepted if raw_weight(choice.module).shape[1:].numel() == 2]:
        yield (
            f"{_listed(small)}: with a fan-in of 2 every standardized weight is 1 or -1, and learning stops. Leave "
            "such convolutions alone with `exclude`."
        )
    if formula.rescaling != "affine":
        yield from _trained_before(selection)


def _trained_before(selection: Selection) -> Iterator[str]:
    """What gives away that weights were not made for this training: norms that have counted, parameters that stay."""
    if frozen := [choice for choice in selection.accepted if not raw_weight(choice.module).requires_grad]:
        yield (
            f"{_listed(frozen)}: standardized although frozen (requires_grad=False). That is right for weights trained "
            "with Weight Standardization; others compute something else now. Leave those alone with `exclude`, or keep "
            "their function with formula='affine'."
        )
    batches = max(map(_batches_counted, selection.module.modules()), default=0)
    if batches > 0 and selection.accepted:
        yield (
            f"{type(selection.module).__name__} has been trained: its batch norms have counted {batches} batches. If "
            "that was without Weight Standardization, it computes something else from now on, and what it had learned "
            "is lost: keep its function with formula='affine'. If it was with it, all is well."
        )


def _batches_counted(layer: Any) -> int:
    count = getattr(layer, "num_batches_tracked", None)
    return int(count) if isinstance(count, torch.Tensor) and not count.is_meta else 0


def _order_in_doubt(selection: Selection) -> Iterator[str]:
    """Only a count asks for the order, and one that leaves out all or nothing does not."""
    execution, count = selection.execution, selection.rules.n_last_layers_ignore
    if not 0 < count < len(selection.choices):
        return
    assumed = [choice for choice in selection.choices[-count:] if choice.place.assumed]
    if execution.failure is not None:
        yield (
            f"What `n_last_layers_ignore` counts is not certain: {execution.failure}, so its parts are counted in the "
            f"order in which they are defined, among the {len(selection.choices)} convolutions of "
            f"{type(selection.module).__name__}. Give an `example_input`, or name the layers with `exclude`."
        )
    elif execution.doubt is not None or assumed:
        doubt = execution.doubt or f"{_first_of(execution.untraced)}, and whether {_listed(assumed)} runs is not known"
        yield (
            f"What `n_last_layers_ignore` counts is not certain: {doubt}. Give an `example_input`, or name "
            "the layers with `exclude`."
        )


def _seen_in_one_mode(selection: Selection) -> Iterator[str]:
    """A norm that was seen in evaluation alone is taken to follow in training too, and the other way round."""
    causes = selection.execution.in_one_mode
    if causes and selection.rules.layers == "normalized":
        yield (
            f"What follows some convolutions was seen in one mode only: {_first_of(causes)}. If something else follows "
            "in the other mode, name them in `exclude`."
        )


def _followed_by_no_norm(selection: Selection) -> Iterator[str]:
    if selection.rules.layers != "all":
        return
    plain = [c for c in selection.chosen if c.place.norm is None and c.place.executed and not c.place.undecided]
    if plain:
        yield (
            f"{len(plain)} of the {len(selection.chosen)} convolutions standardized are followed by no normalization "
            f"layer: {_listed(plain)}. Their outputs grow by about the root of the fan-in, and training may fail. Use "
            "layers='normalized' to leave them alone, or name them in `exclude`."
        )


def _not_traced(selection: Selection, formula: Formula) -> Iterator[str]:
    """What is not known, and what is taken for granted, of modules whose forward cannot be traced."""
    causes = selection.execution.untraced
    because = f": {_first_of(causes)}" if causes else ""
    normalized = selection.rules.layers == "normalized"
    undecided = [c for c in selection.choices if c.place.undecided]
    left_alone = [c for c in undecided if (c.skipped_because or "").startswith("layers=")]
    taken = [c for c in undecided if c in selection.accepted and formula.rescaling is None]
    if left_alone or taken:
        consequence = (
            "They are left alone. Give an `example_input`, or use layers='all' and name what is to be left alone"
            if left_alone
            else "They are standardized all the same, and where none follows, training may fail. Use "
            "layers='normalized', or name those"
        )
        yield (
            f"Whether a normalization layer follows {_listed(left_alone or taken)} cannot be told without an "
            f"input{because}. {consequence} in `exclude`."
        )
    elif normalized and causes and selection.accepted:
        yield (
            f"Norms were found in parts{because}. Its parts are taken to be used through their own forward, with the "
            "arguments that it must have. If they are used otherwise, give an `example_input`."
        )


def _unused(selection: Selection) -> Iterator[str]:
    """Left alone by the rule, or counted first, for want of an input with which they run."""
    rules = selection.rules
    unused = [c for c in selection.choices if not c.place.executed and not c.place.undecided]
    by_rule = [c for c in unused if (c.skipped_because or "").startswith("layers=")]
    if by_rule or (unused and 0 < rules.n_last_layers_ignore < len(selection.choices)):
        yield (
            f"{_listed(by_rule or unused)}: forward does not use them, called with the arguments that it must have. If "
            "others switch them on, give them in an `example_input`, or name the layers in `include` and `exclude`."
        )


def _shared_weights(selection: Selection) -> Iterator[str]:
    """A raw weight that a layer uses as it is, beside a convolution that standardizes it."""
    standardized = {choice.module for choice in selection.choices if standardizers_of(choice.module)}
    standardized |= {choice.module for choice in selection.accepted}
    parts = {part for conv in standardized for part in conv.modules()}
    names = {id(raw_weight(choice.module)): choice for choice in selection.accepted}
    for name, layer in selection.module.named_modules():
        if layer in parts:
            continue
        for parameter in layer.parameters(recurse=False):
            if id(parameter) in names:
                other = f"{name or 'the model itself'} ({type(layer).__name__})"
                yield (
                    f"{names[id(parameter)]}: its weight is shared with {other}, which uses it as it is. "
                    "Leave both alone with `exclude`, or give them weights of their own."
                )


def _first_of(causes: tuple[str, ...]) -> str:
    return causes[0] + (f", and {len(causes) - 1} more" if len(causes) > 1 else "")


def _listed(choices: list[ConvolutionChoice]) -> str:
    return ", ".join(map(str, choices))
