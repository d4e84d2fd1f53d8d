"""The command ``ws-algorithm``, also ``python -m ws_algorithm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import ws_algorithm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for mistakes in a recipe, 130 or 143 if interrupted."""
    options = _parse(arguments)
    try:
        options.run(options)
    except ValueError as error:
        from ws_algorithm.recipes.schema import RecipeError  # here: `benchmark` needs nothing but torch and torchvision

        if not isinstance(error, RecipeError):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 130
        if code not in (130, 143):  # SIGINT and SIGTERM, which Composer turns into SystemExit
            raise
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted; the same command with autoresume=true continues the run", file=sys.stderr)
        return int(code)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may stand on either side of an option, which argparse alone does not allow."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    unknown = [other for other in others if other.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if others:
        options.overrides += others
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ws-algorithm", description="Weight Standardization for PyTorch and Composer: recipes and models."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {ws_algorithm.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    train = verbs.add_parser("train", help="train a recipe", description="Train a recipe and write its run folder.")
    train.add_argument("recipe", help="a YAML file, or the name of a shipped recipe such as quickstart")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=1ep model.norm=batch")
    train.add_argument("--dry-run", action="store_true", help="check the recipe, print it resolved and stop")
    train.set_defaults(run=_train)

    evaluate = verbs.add_parser("evaluate", help="evaluate a run or a checkpoint", description="Evaluate a checkpoint.")
    evaluate.add_argument("recipe", metavar="run|recipe", help="the folder of a run, or a recipe with load_path=FILE")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate.add_argument("--per-class", action="store_true", help="print the accuracy of each class too")
    evaluate.set_defaults(run=_evaluate)

    plot = verbs.add_parser("plot", help="draw the curves of runs", description="Draw runs over each other in a PNG.")
    plot.add_argument("runs", nargs="+", metavar="run", help="the folder of a run")
    plot.add_argument("--output", default="plot.png", metavar="FILE", help="the PNG (plot.png)")
    plot.set_defaults(run=_plot)

    inspect = verbs.add_parser(
        "inspect",
        help="show which convolutions are standardized, and why",
        description="Show the convolutions of a model in the order of execution, and what is done with each. Nothing "
        "is trained or downloaded.",
    )
    inspect.add_argument("recipe", metavar="MODEL", help="a recipe, torchvision:NAME or timm:NAME")
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="for a recipe")
    inspect.add_argument("--layers", help="all, or normalized: only those that a normalization layer follows")
    inspect.add_argument("--include", nargs="+", metavar="PATTERN", help="only these: names of layers, or patterns")
    inspect.add_argument("--exclude", nargs="+", metavar="PATTERN", help="not these")
    inspect.add_argument("--n-last-layers-ignore", type=int, metavar="N", help="not the last N that are executed")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    inspect.set_defaults(run=_inspect)

    _add_benchmark(verbs)

    recipes = verbs.add_parser("recipes", help="list the recipes that ship", description="List the shipped recipes.")
    recipes.set_defaults(run=_recipes)
    return parser


def _add_benchmark(verbs: Any) -> None:
    benchmark = verbs.add_parser(
        "benchmark",
        help="measure what standardization costs, beside that of others",
        description="Measure time and memory of training and evaluating without and with Weight Standardization, ours "
        "and others', in turns in one process. Lists have commas between their values; all combinations are measured. "
        "Libraries that are not installed are left out.",
    )
    add = benchmark.add_argument
    add("--models", metavar="NAMES", help="residual networks of torchvision (resnet50)")
    add("--norm", metavar="NAMES", help="group, batch (group)")
    add("--image-sizes", metavar="PIXELS", help="(64,224)")
    add("--micro-batch-sizes", metavar="N", help="images per forward (1)")
    add("--micro-batches", metavar="N", help="forwards and backwards per optimizer step (8)")
    add("--precisions", metavar="NAMES", help="fp32, amp_bf16, amp_fp16 (fp32,amp_bf16)")
    add("--modes", metavar="NAMES", help="train, eval (train,eval)")
    add("--threads", metavar="N", help="CPU threads of one operation (1)")
    add("--preset", metavar="NAME", help="targets: the cases that this package has targets for, instead of the lists")
    add("--channels-last", action="store_true", help="images and weights in this memory format")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--contestants", metavar="NAMES", help="none, exact, once, folded, composer, paper, timm, mmcv (all)")
    add("--repeats", type=int, default=9, metavar="N", help="steps of each contestant that count (9, the fewest)")
    add("--allocator", default="keep", choices=["keep", "default"], help="whether glibc keeps freed memory (keep)")
    add("--output", metavar="FOLDER", help="write overhead.json, overhead.md and overhead.png there")
    benchmark.set_defaults(run=_benchmark)


def _train(options: argparse.Namespace) -> None:
    if options.dry_run:
        _print_resolved(options)
        return
    from ws_algorithm.recipes.train import train

    train(options.recipe, options.overrides)


def _print_resolved(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.catalogue import find_recipe
    from ws_algorithm.recipes.reading import lineage
    from ws_algorithm.recipes.resolve import resolve_recipe
    from ws_algorithm.recipes.schema import to_yaml

    text = to_yaml(resolve_recipe(options.recipe, options.overrides))
    print(f"# {lineage(find_recipe(options.recipe))}\n{text}", end="")


def _evaluate(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.evaluate import evaluate

    evaluate(options.recipe, options.overrides, per_class=options.per_class)


def _plot(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.plot import plot

    plot(options.runs, options.output)


def _inspect(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.inspect import RULES, inspect

    rules = {name: getattr(options, name) for name in RULES if getattr(options, name) is not None}
    inspect(options.recipe, options.overrides, as_json=options.json, **rules)


def _benchmark(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.benchmark import LISTS, benchmark, contestants_of, plan, prepare_output
    from ws_algorithm.recipes.overhead import check_repeats

    try:
        lists = {name: getattr(options, name) for name in LISTS}
        cases = plan(lists, options.device, options.preset, options.channels_last)
        contestants = contestants_of(options.contestants)
        check_repeats(options.repeats)
        if options.output is not None:
            prepare_output(options.output)
    except ValueError as error:
        print(f"ws-algorithm benchmark: {error}", file=sys.stderr)
        sys.exit(2)
    benchmark(cases, contestants, repeats=options.repeats, allocator=options.allocator, output=options.output)


def _recipes(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.catalogue import describe, shipped_recipes

    recipes = shipped_recipes()
    width = max(len(name) for name in recipes)
    for name, path in recipes.items():
        print(f"{name:{width}}  {describe(path)}")


if __name__ == "__main__":
    sys.exit(main())
