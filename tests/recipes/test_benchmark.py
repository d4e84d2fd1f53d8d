"""``ws-algorithm benchmark``: which cases it measures, what it writes and what it refuses."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from ws_algorithm.__main__ import main
from ws_algorithm.recipes import contest
from ws_algorithm.recipes.benchmark import benchmark, contestants_of, plan
from ws_algorithm.recipes.contest import Case
from ws_algorithm.recipes.overhead import Record, Spread
from ws_algorithm.recipes.overhead_report import to_markdown
from ws_algorithm.recipes.rivals import RIVALS

from .runs import CHECKOUT, environment
from .test_overhead import classifier

TINY_OPTIONS = ["--models", "resnet18", "--image-sizes", "32", "--micro-batches", "2", "--precisions", "fp32"]


def test_the_command_writes_what_it_prints(capsys, monkeypatch):
    monkeypatch.setattr(contest, "build_model", lambda case: classifier())
    options = ["--contestants", "exact,folded", "--allocator", "default", "--output", "there/overhead"]

    assert main(["benchmark", *TINY_OPTIONS, *options]) == 0

    printed = capsys.readouterr()
    content = json.loads(Path("there/overhead/overhead.json").read_text())
    markdown = Path("there/overhead/overhead.md").read_text()
    records = content["records"]
    assert [(record["case"]["mode"], record["contestant"]) for record in records] == [
        *[("train", "none"), ("train", "exact")],
        *[("eval", "none"), ("eval", "exact"), ("eval", "folded")],
    ]
    assert {name: content["machine"][name] for name in ("torch", "threads", "allocator")} == {
        "torch": torch.__version__,
        "threads": "1",
        "allocator": "default",
    }
    rows = [line for line in markdown.splitlines() if line.startswith(tuple(f"| {name} |" for name in RIVALS))]
    for record, row in zip(records, rows, strict=True):
        ratio = record["ratio"]
        assert row.startswith(f"| {record['contestant']} |") and row in printed.out
        assert f"| {ratio['median']:.3f} ({ratio['lower']:.3f}-{ratio['upper']:.3f}) |" in row
    assert "train without folded: what it trains is not standardized" in printed.out
    assert printed.out.startswith(markdown.splitlines()[0])
    assert len(printed.err.splitlines()) == 2 * 11
    with Image.open("there/overhead/overhead.png") as image:
        assert image.format == "PNG"


def test_the_table_is_in_milliseconds_and_mebibytes():
    case = Case(model="resnet18", image_size=32, micro_batches=2)
    record = Record(case, "exact", [0.5] * 9, Spread(0.5, 0.25, 0.75), Spread(1.5, 1.0, 2.0), 3 * 2**20, 0, None)

    assert to_markdown({"device": "a CPU", "cuda": None}, [record]).splitlines() == [
        "device: a CPU",
        "",
        "## train resnet18 (group norm), 32 px, 2 x 1 image(s), fp32, cpu, 1 thread",
        "",
        "Median and quartiles of 9 steps.",
        "",
        "| contestant | what it is | ms per step (quartiles) | ratio to none (quartiles) | saved for backward "
        "| held in a step | peak on the device |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| exact | ours, in every forward | 500.00 (250.00-750.00) | 1.500 (1.000-2.000) | 3.0 MiB | 0.0 MiB | - |",
    ]


def test_cases_are_all_combinations_and_an_evaluation_counts_once():
    cases = plan({"image_sizes": "32,64", "micro_batches": "2,4", "precisions": "fp32", "modes": "train,eval"})

    assert [(case.mode, case.image_size, case.micro_batches) for case in cases] == [
        *[("train", 32, 2), ("eval", 32, 1), ("train", 32, 4)],
        *[("train", 64, 2), ("eval", 64, 1), ("train", 64, 4)],
    ]
    assert {(case.model, case.norm, case.threads, case.device) for case in cases} == {("resnet50", "group", 1, "cpu")}


def test_the_cases_that_have_targets():
    cases = [asdict(case) for case in plan({}, preset="targets")]

    names = ("mode", "image_size", "micro_batch_size", "micro_batches", "precision", "threads")
    assert [tuple(case[name] for name in names) for case in cases] == [
        ("train", 64, 1, 8, "fp32", 1),
        ("train", 224, 1, 4, "fp32", 1),
        ("train", 64, 1, 8, "amp_bf16", 2),
        ("eval", 64, 1, 1, "fp32", 1),
        ("eval", 224, 1, 1, "fp32", 1),
    ]
    assert contestants_of(None) == list(RIVALS)
    assert contestants_of("once") == ["none", "once"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "resnet5"], "`model` (='resnet5') must be one of resnet101, resnet152, resnet18, "),
        (["--contestants", "exact,oncee"], f"`contestants` (='oncee') must be one of {', '.join(RIVALS)}."),
        (["--norm", "layer"], "`norm` (='layer') must be one of group, batch."),
        (["--precisions", "bf16"], "`precision` (='bf16') must be one of fp32, amp_bf16, amp_fp16."),
        (["--modes", "test"], "`mode` (='test') must be one of train, eval."),
        (["--device", "tpu"], "`device` (='tpu') must be one of cpu, cuda."),
        (["--image-sizes", "64,big"], "`image_sizes` (='64,big') must be whole numbers with commas between them"),
        (["--threads", "0"], "`threads` (=0) must be a whole number from 1 on."),
        (["--repeats", "8"], "`repeats` (=8) must be at least 9: quartiles of fewer say little."),
        (["--preset", "target"], "`preset` (='target') must be one of targets."),
        (["--preset", "targets", "--modes", "eval"], "`preset` (='targets') says what is measured; leave modes out."),
    ],
)
def test_mistakes_are_a_line_each(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["benchmark", *options])

    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith(f"ws-algorithm benchmark: {message}") and len(printed.err.splitlines()) == 1


def test_an_allocator_that_there_is_not():
    with pytest.raises(ValueError, match=r"`allocator` \(='jemalloc'\) must be one of default, keep"):
        benchmark([Case()], ["none"], allocator="jemalloc")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ws_algorithm.__main__ import main\n"
        "try:\n    main(['benchmark', '--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'torchvision', 'composer', 'omegaconf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=120, check=True)


WITHOUT_OTHERS = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("composer", "omegaconf", "timm", "mmcv"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
script, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def test_the_script_needs_torch_and_torchvision_alone():
    options = [*TINY_OPTIONS, "--modes", "eval", "--contestants", "none,composer,timm,folded"]
    command = [sys.executable, "-c", WITHOUT_OTHERS, str(CHECKOUT / "benchmarks" / "overhead.py"), *options]

    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert "eval without composer: composer.functional cannot be imported" in done.stdout
    assert "eval without timm: timm.layers.std_conv cannot be imported" in done.stdout
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| contestant", "| ---", "| none", "| folded"]


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--image-sizes", "32", "--output", str(tmp_path / "file" / "results")])

    output = capsys.readouterr()
    assert "`output` (=" in output.err and "Not a directory" in output.err and not output.out
