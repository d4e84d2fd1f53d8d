"""The linear rule: learning rates that are meant for one batch size, multiplied for another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ws_algorithm.recipes.schema import Recipe


def check_linear_rule(recipe: Recipe) -> list[str]:
    """The mistakes in ``lr_base_batch_size``, each a line that begins with its key."""
    base, optimizer = recipe.lr_base_batch_size, recipe.optimizers or {}
    if base is None:
        return []
    if base < 1:
        return [f"`lr_base_batch_size` (={base}) must be the positive batch size for which `optimizers.lr` is meant."]
    if "lr" not in optimizer:
        return ["`lr_base_batch_size` needs `optimizers.lr`, which it multiplies."]
    return []


def apply_linear_rule(recipe: Recipe) -> Recipe:
    """A recipe whose learning rates are those for its own batch size, and that says so.

    ``lr``, of the optimizer and of each parameter group that has its own, is multiplied by ``global_train_batch_size /
    lr_base_batch_size``, and ``lr_base_batch_size`` becomes ``global_train_batch_size``: to resolve what is resolved
    changes nothing. ``lr_factor`` follows ``lr``. Values that are no numbers stay, for others to refuse.

    Source: P. Goyal et al., `Accurate, Large Minibatch SGD <https://arxiv.org/abs/1706.02677>`_.
    """
    base, batch, optimizer = recipe.lr_base_batch_size, recipe.global_train_batch_size, recipe.optimizers
    if base is None or not isinstance(batch, int) or batch < 1 or batch == base or not isinstance(optimizer, dict):
        return recipe
    scaled = _scaled(optimizer, batch / base)
    if isinstance(groups := optimizer.get("param_groups"), list):
        scaled["param_groups"] = [_scaled(g, batch / base) if isinstance(g, dict) else g for g in groups]
    return replace(recipe, optimizers=scaled, lr_base_batch_size=batch)


def _scaled(options: dict[str, Any], ratio: float) -> dict[str, Any]:
    try:
        lr = float(options["lr"])
    except (KeyError, TypeError, ValueError):
        return dict(options)
    return {**options, "lr": float(f"{lr * ratio:.12g}") if math.isfinite(lr) else options["lr"]}
