"""Who may import whom. A file imports from the floors below its own; a new file needs a place in the table."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import ws_algorithm

PACKAGE = Path(ws_algorithm.__file__).parent

# From the ground up. Files on one floor do not import one another
FLOORS = [
    [
        "formula.py",
        "layers.py",
        "patterns.py",
        "torch_internals.py",
        "checkpoints/class_rows.py",
        "checkpoints/targets.py",
        "checkpoints/unpickling.py",
        "tracing/proxies.py",
        "tracing/random_states.py",
    ],
    [
        "batch_norms.py",
        "group_norm_rules.py",
        "rescaling.py",
        "triton_kernels.py",
        "checkpoints/numpy_files.py",
        "checkpoints/run_formulas.py",
        "checkpoints/sources.py",
        "checkpoints/torch_files.py",
        "tracing/dataflow.py",
        "tracing/meta_copy.py",
    ],
    [
        "group_norm.py",
        "multi_tensor.py",
        "checkpoints/big_transfer.py",
        "checkpoints/deeplabv3_pytorch.py",
        "checkpoints/detectron.py",
        "checkpoints/mmdetection.py",
        "checkpoints/reading.py",
        "checkpoints/residual.py",
        "tracing/graph.py",
        "tracing/observed_run.py",
    ],
    ["weight_cache.py", "checkpoints/maskrcnn_benchmark.py", "tracing/execution.py"],
    ["deferred_gradient.py", "checkpoints/conversion.py"],
    ["parametrization.py"],
    ["once.py", "selection.py"],
    ["cautions.py", "folding.py", "gains.py", "inspection.py"],
    ["functional.py", "state_dicts.py"],
    ["checkpoint_loading.py", "trainer_scopes.py"],
    ["algorithm.py"],
    [
        "recipes/artifacts.py",
        "recipes/aspect_ratios.py",
        "recipes/class_folders.py",
        "recipes/classifier.py",
        "recipes/coco_files.py",
        "recipes/coco_metrics.py",
        "recipes/coco_mistakes.py",
        "recipes/detection_input.py",
        "recipes/detector.py",
        "recipes/drawing.py",
        "recipes/image_files.py",
        "recipes/image_lists.py",
        "recipes/image_transforms.py",
        "recipes/initialization.py",
        "recipes/loading.py",
        "recipes/network_arguments.py",
        "recipes/norm_layers.py",
        "recipes/object_targets.py",
        "recipes/pretrained.py",
        "recipes/region_proposals.py",
        "recipes/resnets.py",
        "recipes/roi_heads.py",
        "recipes/synthetic.py",
        "recipes/synthetic_objects.py",
    ],
    [
        "recipes/models/*.py",
        "recipes/data/*.py",
        "recipes/best_checkpoint.py",
        "recipes/catalogue.py",
        "recipes/closing.py",
        "recipes/given_images.py",
        "recipes/linear_warmup_multi_step.py",
        "recipes/named_models.py",
        "recipes/parameter_names.py",
        "recipes/per_class.py",
        "recipes/report.py",
        "recipes/rivals.py",
        "recipes/run_folder.py",
        "recipes/run_log.py",
        "recipes/schema.py",
        "recipes/early_stopper.py",
        "recipes/signatures.py",
    ],
    [
        "recipes/registry.py",
        "recipes/values.py",
        "recipes/contest.py",
        "recipes/curves.py",
        "recipes/epoch_table.py",
        "recipes/evaluation_results.py",
        "recipes/freezing.py",
        "recipes/linear_rule.py",
        "recipes/metrics.py",
        "recipes/origins.py",
        "recipes/parameter_groups.py",
        "recipes/predictions.py",
        "recipes/reading.py",
    ],
    ["recipes/build.py", "recipes/overhead.py"],
    ["recipes/resolve.py", "recipes/overhead_report.py"],
    ["recipes/loaded_run.py"],
    [
        "recipes/train.py",
        "recipes/convert.py",
        "recipes/evaluate.py",
        "recipes/export.py",
        "recipes/inspect.py",
        "recipes/plot.py",
        "recipes/predict.py",
        "recipes/benchmark.py",
    ],
    ["__main__.py"],
]
METHOD = range(0, 11)
TORCH_ALONE = range(0, 9)

# Without `__init__.py`: the root's has tests of its own below, the others hold a docstring
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def floor_of(file: str) -> int:
    floors = [floor for floor, patterns in enumerate(FLOORS) if any(fnmatchcase(file, pattern) for pattern in patterns)]
    assert len(floors) == 1, f"{file} has no place in FLOORS: which files may import it, and which does it import?"
    return floors[0]


def imported_modules(file: str) -> set[str]:
    """Dotted names of all that a file imports, wherever in the file; of ``from a import b`` it is ``a.b``."""
    folder = ["ws_algorithm", *Path(file).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def own_file(name: str) -> str | None:
    """The file of the package that an imported name lies in; ``None`` for the root itself."""
    parts = name.split(".")[1:]
    if parts and parts[0] in ws_algorithm._FILE_OF:
        return f"{ws_algorithm._FILE_OF[parts[0]].replace('.', '/')}.py"
    for length in range(len(parts), 0, -1):
        file = "/".join(parts[:length]) + ".py"
        if file in FILES:
            return file
    assert name == "ws_algorithm" or parts[0].startswith("__"), f"{name} is not in a file of the package"
    return None


def own_imports(file: str) -> set[str]:
    names = {name for name in imported_modules(file) if name.partition(".")[0] == "ws_algorithm"}
    return {imported for name in names if (imported := own_file(name)) is not None}


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_lower_floors_only(file):
    floor = floor_of(file)

    assert {imported for imported in own_imports(file) if floor_of(imported) >= floor} == set()


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("recipes/")])
def test_the_method_below_the_algorithm_needs_torch_alone(file):
    if floor_of(file) in TORCH_ALONE:
        roots = {name.partition(".")[0] for name in imported_modules(file)}

        allowed = {"torch", "ws_algorithm", *(["triton"] if file == "triton_kernels.py" else [])}
        assert roots - sys.stdlib_module_names <= allowed


def test_a_machine_without_cuda_never_imports_triton():
    program = (
        "import sys, torch; from ws_algorithm import apply_weight_standardization, standardize_once;"
        "conv = torch.nn.Conv2d(3, 8, 3); apply_weight_standardization(conv)\n"
        "with standardize_once(conv): conv(torch.ones(1, 3, 8, 8)).sum().backward()\n"
        "with torch.no_grad(): conv(torch.ones(1, 3, 8, 8))\n"
        "assert 'triton' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("recipes/") and file != "__main__.py"])
def test_the_method_does_not_know_the_recipes(file):
    assert floor_of(file) in METHOD
    assert not any(imported.startswith("recipes/") for imported in own_imports(file))


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("recipes/models/")])
def test_models_do_not_know_the_method(file):
    assert {imported for imported in own_imports(file) if floor_of(imported) in METHOD} == set()


def test_the_check_sees_imports(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.py").write_text(
        "import torch.nn as nn\nfrom . import registry\nfrom .. import functional\n"
        "def f():\n    from ws_algorithm.recipes.schema import Recipe\n"
        "    from ws_algorithm import Formula, __version__\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "FILES", ["functional.py", "recipes/registry.py", "recipes/schema.py"])

    assert "torch.nn" in imported_modules("recipes/train.py")
    assert own_imports("recipes/train.py") == {
        "functional.py",
        "recipes/registry.py",
        "recipes/schema.py",
        "formula.py",
    }
    with pytest.raises(AssertionError, match="new.py has no place in FLOORS"):
        floor_of("new.py")


def test_the_other_init_files_are_empty():
    for path in PACKAGE.rglob("*/__init__.py"):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), f"{path}: names have one home, the file that they are in"


def test_every_pattern_of_the_table_has_a_file():
    patterns = {pattern for floor in FLOORS for pattern in floor}

    assert {pattern for pattern in patterns if not any(fnmatchcase(file, pattern) for file in FILES)} == set()


@pytest.mark.parametrize("name", ws_algorithm._FILE_OF)
def test_public_names_resolve(name):
    value = getattr(ws_algorithm, name)

    assert getattr(value, "__module__", None) in (f"ws_algorithm.{ws_algorithm._FILE_OF[name]}", None)
    assert name in dir(ws_algorithm)


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.asname: node.module for node in imports for alias in node.names}

    assert declared == {name: f"ws_algorithm.{file}" for name, file in ws_algorithm._FILE_OF.items()}


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'ws_algorithm' has no attribute 'WeightStandardisation'"):
        ws_algorithm.WeightStandardisation  # noqa: B018


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_package_imports_nothing_else():
    code = "import sys, ws_algorithm; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code).split())

    # `site` may have loaded what .pth files of the environment name
    before = set(run_python("import sys; print(*{name.partition('.')[0] for name in sys.modules})").split())
    assert loaded - before - sys.stdlib_module_names == {"ws_algorithm"}
    assert not loaded & {"torch", "composer", "torchvision", "matplotlib"}


WITHOUT_COMPOSER = """
import sys

class NoComposer:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "composer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoComposer())

import ws_algorithm
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
print(ws_algorithm.apply_weight_standardization(model, 1), ws_algorithm.is_weight_standardized(model))
print(ws_algorithm.fold_weight_standardization(model), ws_algorithm.remove_weight_standardization(model))
print(ws_algorithm.WeightStandardizer(), ws_algorithm.Formula, *ws_algorithm.FORMULAS)
try:
    ws_algorithm.WeightStandardization
except ModuleNotFoundError as error:
    print(error.name, error)
print("torchvision" in sys.modules)
"""


def test_the_functions_work_without_composer():
    lines = run_python(WITHOUT_COMPOSER).splitlines()

    assert lines[:2] == ["1 True", "1 0"]
    assert lines[3].startswith("composer") and "pip install mosaicml" in lines[3]
    assert lines[4] == "False"
