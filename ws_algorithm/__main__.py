"""The command ``ws-algorithm``, also ``python -m ws_algorithm``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import ws_algorithm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    That is 0, 1 if nobody reads what it prints (``| head``), 2 for mistakes in a recipe, 130 or 143 if interrupted.
    """
    try:
        try:
            code = _run(_parse(arguments))
        except SystemExit:  # of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_output_cut_off():
            raise
        return 1
    return code


def _is_output_cut_off() -> bool:
    """Whether nobody reads standard output; what is left to print then goes nowhere."""
    try:
        print(flush=True)  # not all that failed is still to be flushed
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return True
    return False


def _run(options: argparse.Namespace) -> int:
    has_processes = _has_process_group()
    try:
        options.run(options)
        if not has_processes and _has_process_group():
            _leave_process_group()
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


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")  # not imported: help and lists need no torch
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _leave_process_group() -> None:
    """End the threads of the process group that a verb began, once all processes have come to their end.

    A process that ends while they run may be aborted at its very end, after all its work.
    """
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()


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
    evaluate.add_argument("--output", metavar="FILE", help="what was detected, as COCO results (RUN/detections.json)")
    evaluate.set_defaults(run=_evaluate)

    _add_predict(verbs)

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

    _add_convert(verbs)
    _add_export(verbs)
    _add_benchmark(verbs)

    recipes = verbs.add_parser("recipes", help="list the recipes that ship", description="List the shipped recipes.")
    recipes.set_defaults(run=_recipes)
    return parser


def _add_predict(verbs: Any) -> None:
    predict = verbs.add_parser(
        "predict",
        help="show what a run finds in images",
        description="Show what the checkpoint of a run, that which `evaluate` takes, finds in images: objects, drawn "
        "in a PNG for each image, or a table of the most probable classes.",
    )
    predict.add_argument("recipe", metavar="run|recipe", help="the folder of a run, or a recipe with load_path=FILE")
    predict.add_argument(
        "overrides",
        nargs="+",
        metavar="IMAGE|key=value",
        help="files, folders or patterns; and overrides of the recipe",
    )
    predict.add_argument("--output", metavar="DIR", help="the folder of the pictures; replaces none (predictions)")
    predict.add_argument("--score-threshold", type=float, metavar="SCORE", help="the least score of an object (0.5)")
    predict.set_defaults(run=_predict)


def _add_export(verbs: Any) -> None:
    export = verbs.add_parser(
        "export",
        help="write the network of a run, folded, for use elsewhere",
        description="Write the network of a checkpoint, its standardization folded, and compare what the file computes "
        "with the trained network.",
    )
    export.add_argument("recipe", metavar="run|recipe", help="the folder of a run, or a recipe with load_path=FILE")
    export.add_argument("overrides", nargs="*", metavar="key=value")
    export.add_argument(
        "--format", required=True, metavar="NAME", help="state_dict, safetensors, onnx, torch_export or torchscript"
    )
    export.add_argument("--output", metavar="FILE", help="the new file (exported.* in the folder of the run)")
    export.add_argument("--plain", action="store_true", help="raw weights, not folded ones; for weights alone")
    export.set_defaults(run=_export)


def _add_convert(verbs: Any) -> None:
    convert = verbs.add_parser(
        "convert",
        help="convert published weights",
        description="Convert published weights to the names of torchvision or timm, with the formula, the classes and "
        "the channels that they were trained with, and write a recipe beside them. Nothing in the file is run.",
    )
    convert.add_argument("checkpoint", metavar="SOURCE", help="a .pth, .pth.tar, .pkl, .npz or .safetensors file")
    convert.add_argument("output", metavar="OUT", help="the file to write; OUT with the suffix .yaml is its recipe")
    convert.add_argument("--to", required=True, metavar="LIBRARY", help="torchvision or timm")
    convert.add_argument("--model", required=True, metavar="MODEL", help="such as resnet50 or mask_rcnn_resnet50")
    convert.add_argument("--source", metavar="NAME", help="where the weights are from (told from their names)")
    convert.add_argument("--formula", metavar="NAME", help="what they were trained with, or none (that of the source)")
    convert.add_argument("--overwrite", action="store_true", help="replace files that are there")
    convert.set_defaults(run=_convert)


def _add_benchmark(verbs: Any) -> None:
    benchmark = verbs.add_parser(
        "benchmark",
        help="measure what standardization costs, beside that of others",
        description="Measure time and memory of training and evaluating without and with Weight Standardization, ours "
        "and others', in turns in one process. Lists have commas between their values; all combinations are measured. "
        "Libraries that are not installed are left out.",
    )
    add = benchmark.add_argument
    add("--models", metavar="NAMES", help="residual networks of torchvision, or mask_rcnn_r50 and others (resnet50)")
    add("--norm", metavar="NAMES", help="group, batch (group)")
    add("--image-sizes", metavar="PIXELS", help="(64,224)")
    add("--micro-batch-sizes", metavar="N", help="images per forward (1)")
    add("--micro-batches", metavar="N", help="forwards and backwards per optimizer step (8)")
    add("--precisions", metavar="NAMES", help="fp32, amp_bf16, amp_fp16 (fp32,amp_bf16)")
    add("--modes", metavar="NAMES", help="train, eval (train,eval)")
    add("--threads", metavar="N", help="CPU threads of one operation (1)")
    add("--regions", metavar="N", help="of detectors: regions of an image (512)")
    add("--preset", metavar="NAME", help="targets: the cases that this package has targets for, instead of the lists")
    add("--channels-last", action="store_true", help="images and weights in this memory format")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--contestants", metavar="NAMES", help="none, exact, once, folded, composer, paper, timm, mmcv (all)")
    add("--repeats", type=int, default=9, metavar="N", help="steps of each contestant that count (9, the fewest)")
    add("--allocator", default="default", choices=["default", "keep"], help="keep: glibc keeps freed memory (default)")
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

    evaluate(options.recipe, options.overrides, per_class=options.per_class, output=options.output)


def _predict(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.predict import predict, split_arguments

    images, overrides = split_arguments(options.overrides)
    predict(options.recipe, images, overrides, output=options.output, score_threshold=options.score_threshold)


def _export(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.export import export

    export(options.recipe, options.overrides, file_format=options.format, output=options.output, plain=options.plain)


def _plot(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.plot import plot

    plot(options.runs, options.output)


def _inspect(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.inspect import RULES, inspect

    rules = {name: getattr(options, name) for name in RULES if getattr(options, name) is not None}
    inspect(options.recipe, options.overrides, as_json=options.json, **rules)


def _convert(options: argparse.Namespace) -> None:
    from ws_algorithm.recipes.convert import convert

    given = {name: getattr(options, name) for name in ("to", "model", "source", "formula", "overwrite")}
    convert(options.checkpoint, options.output, **given)


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
