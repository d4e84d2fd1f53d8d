import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from torchvision import datasets

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError

from .texts import recipe_text


@pytest.fixture(autouse=True)
def _no_data_to_read(monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("resolving a recipe reads no data")

    monkeypatch.setattr(sklearn.datasets, "load_digits", refuse)
    monkeypatch.setattr(datasets, "FashionMNIST", refuse)


def mistakes(*overrides: str, source: str = "quickstart") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe(source, overrides)
    return caught.value.errors


def test_a_recipe_of_ones_own_resolves():
    Path("own.yaml").write_text(recipe_text())

    assert resolve_recipe("own.yaml").max_duration == "1ep"


def test_four_different_mistakes_are_four_errors():
    found = mistakes("model.nrom=batch", "optimizers.name=SDG", "max_duration=3epp", "device_train_microbatch_size=3")

    # `over 1 processes`: this test is one
    assert found == [
        "`model.nrom`: unknown argument of cifar_resnet. Did you mean `norm`?",
        "`optimizers.name`: unknown name 'SDG'. Did you mean `SGD`?",
        "`max_duration` (='3epp') must be a positive number of epochs, or a time such as 10ep, 500ba, 20000sp.",
        "`device_train_microbatch_size` (=3) must divide the batch of one device, which is 16 "
        "(`global_train_batch_size` 16 over 1 processes).",
    ]


def test_a_mistake_in_every_block_is_found():
    blocks = ["model", "train_dataloader", "eval_dataloader", "optimizers", "schedulers"]
    overrides = [f"{block}.name=zzz" for block in blocks]
    mappings = ["algorithms", "callbacks", "loggers"]
    overrides += [f"{block}={{zzz: {{}}}}" for block in mappings]

    found = mistakes(*overrides)

    assert [mistake.partition(": unknown name 'zzz'. Choose from: ")[0] for mistake in found] == [
        *(f"`{block}.name`" for block in blocks),
        *(f"`{block}.zzz`" for block in mappings),
    ]


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("model.depth=9", "model", "`depth` (=9) must be 6 n + 2"),
        ("model.width=12", "model", "`num_groups` (=8) must divide the channels of every normalized layer"),
        ("model.norm=layer", "model.norm", "'layer'"),
        ("model.pretrained=nowhere.pt", "model", "`pretrained` (='nowhere.pt') must be a file"),
        ("model.depth=deep", "model.depth", "'deep'"),
        ("model={depth: 8}", "model.name", "missing. Choose from: cifar_alexnet, "),
        ("model={name: 3}", "model.name", "missing"),
        ("model={name: cifar_resnet}", "model.num_classes", "missing"),
        ("train_dataloader.split=valid", "train_dataloader.split", "'valid'"),
        ("train_dataloader.batch_size=4", "train_dataloader.batch_size", "unknown argument of digits"),
        ("train_dataloader={name: fashion_mnist, split: train}", "train_dataloader.root", "missing"),
        ("optimizers.lr=-1", "optimizers", "Invalid learning rate"),
        ("optimizers.lr=fast", "optimizers.lr", "'fast'"),
        ("optimizers.learning_rate=1", "optimizers.learning_rate", "unknown argument of SGD"),
        ("optimizers.param_groups=[{params: head}]", "optimizers", "selects nothing with 'head'"),
        ("optimizers.param_groups=[{params: bias, wd: 0}]", "optimizers.param_groups[0].wd", "unknown argument"),
        ("optimizers.param_groups=[{params: bias, lr: x}]", "optimizers.param_groups[0].lr", "'x'"),
        ("optimizers.param_groups=bias", "optimizers.param_groups", "must be a list"),
        ("schedulers.t_warmup=long", "schedulers", "Invalid time string: long"),
        ("schedulers={name: CosineAnnealingWithWarmupScheduler}", "schedulers.t_warmup", "missing"),
        (
            "algorithms.WeightStandardization.formula=papre",
            "algorithms.WeightStandardization",
            "(='papre') must be one",
        ),
        ("algorithms.WeightStandardization.n_last_layers_ignore=-1", "algorithms.WeightStandardization", "(=-1)"),
        ("algorithms.WeightStandardization=null", "algorithms.WeightStandardization", "Write {} for the defaults"),
        (
            "algorithms={GradientClipping: {clipping_type: norm}}",
            "algorithms.GradientClipping.clipping_threshold",
            "mis",
        ),
        ("algorithms={weightstandardisation: {}}", "algorithms.weightstandardisation", "mean `WeightStandardization`"),
        ("callbacks={LRMonitors: {}}", "callbacks.LRMonitors", "Did you mean `LRMonitor`"),
        ("callbacks={EarlyStopper: {monitor: x}}", "callbacks.EarlyStopper.dataloader_label", "missing"),
        ("loggers={FileLogger: {file: x}}", "loggers.FileLogger.file", "Did you mean `filename`"),
        ("max_duration=0", "max_duration", "must be a positive number of epochs"),
        ("max_duration=-3ep", "max_duration", "must be a positive number of epochs"),
        ("eval_interval=often", "eval_interval", "must be a positive number of epochs"),
        ("save_interval=0ba", "save_interval", "must be a positive number of epochs"),
        ("precision=amp_bf61", "precision", "Did you mean `amp_bf16`"),
        ("ddp_sync_strategy=none", "ddp_sync_strategy", "Choose from: single_auto_sync"),
        ("num_threads=0", "num_threads", "must be at least 1"),
        ("save_num_checkpoints_to_keep=0", "save_num_checkpoints_to_keep", "nothing could resume"),
        ("load_path=nowhere.pt", "load_path", "there is no such file"),
        ("monitor=MultiAccuracy", "monitor", "Did you mean `MulticlassAccuracy`"),
        ("monitor=CrossEntropy", "monitor", "does not say whether higher or lower is better"),
        ("global_eval_batch_size=0", "global_eval_batch_size", "must be a positive multiple"),
    ],
)
def test_a_mistake_is_one_error_at_its_key(override, key, says):
    (mistake,) = mistakes(override)

    assert mistake.startswith(f"`{key}`")
    assert says in mistake


def test_continuing_and_replacing_exclude_each_other():
    (mistake,) = mistakes("autoresume=true", "save_overwrite=true")

    assert "`save_overwrite` and `autoresume` cannot both be true" in mistake


def test_mistakes_in_the_optimizer_are_found_beside_one_in_the_model():
    assert [mistake[:12] for mistake in mistakes("model.depth=9", "optimizers.lr=-1")] == [
        "`model`: `de",
        "`optimizers`",
    ]


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "max_duration=0.5dur",
        "max_duration=64sp",  # a schedule whose warm-up is in epochs
        "schedulers.t_warmup=1",  # without a unit
        "scale_schedule_ratio=0",
        "python_log_level=loud",
    ],
)
def test_what_training_would_refuse_is_refused_before(override):
    assert len(mistakes(override)) == 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["device=cpu", "device_train_microbatch_size=auto"], "device_train_microbatch_size"),
        (["device=cpu", "precision=amp_fp16"], "precision"),
        (["device=gpu"], "device"),
    ],
)
def test_what_the_device_cannot_do_is_refused(overrides, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    (mistake,) = mistakes(*overrides)

    assert mistake.startswith(f"`{key}`")


@pytest.mark.parametrize("name", ["TensorboardLogger", "WandBLogger", "MLFlowLogger"])
def test_a_logger_that_is_not_installed_names_its_extra(name, monkeypatch):
    extra = name.removesuffix("Logger").lower()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *a: None if module == extra else find_spec(module, *a)
    )

    assert mistakes(f"loggers={{{name}: {{}}}}") == [
        f'`loggers.{name}`: {name} needs {extra}: pip install "ws-algorithm[{extra}]".'
    ]


@pytest.mark.parametrize(
    ("name", "module"), [("CometMLLogger", "comet_ml"), ("NeptuneLogger", "neptune"), ("SlackLogger", "slack_sdk")]
)
def test_a_logger_that_is_not_installed_is_a_mistake(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)

    (mistake,) = mistakes(f"loggers={{{name}: {{}}}}")

    assert mistake.startswith(f"`loggers.{name}`")


def test_a_logger_of_composer_alone_needs_no_extra():
    assert registry.missing_extra("FileLogger") is None


@pytest.mark.parametrize("name", ["quikstart", "."])
def test_a_recipe_that_is_not_there_is_a_mistake(name):
    (mistake,) = mistakes(source=name)

    assert mistake.startswith(f"`recipe` (={name!r})")


def test_resolving_leaves_random_states_and_files_alone(tmp_path):
    def draw_from_copies() -> tuple[float, ...]:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        drawn = torch.rand(()).item(), random.random(), float(np.random.rand())
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        return drawn

    before = draw_from_copies()

    resolve_recipe("quickstart", ["algorithms.MixUp={}", "callbacks={LRMonitor: {}}", "loggers={FileLogger: {}}"])

    assert draw_from_copies() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight_decay", ["-1", "nan"])
def test_options_of_a_group_are_judged_by_the_optimizer(weight_decay):
    (mistake,) = mistakes(
        f"optimizers.param_groups=[{{params: norm, lr: 0.1, weight_decay: .{weight_decay}}}]".replace(".-", "-")
    )

    assert mistake.startswith("`optimizers.param_groups[0]")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("run_name=../x", "run_name"),
        ("save_folder=''", "save_folder"),
        ("save_folder=s3://bucket/x", "save_folder"),
        ("callbacks={CheckpointSaver: {}}", "callbacks.CheckpointSaver"),
        ("compile_config={foo: 1}", "compile_config.foo"),
        ("parallelism_config={foo: 1}", "parallelism_config.foo"),
        ("optimizers={name: LBFGS}", "optimizers.name"),
        ("optimizers.lr=.nan", "optimizers.lr"),
        ("precision=amp_bf16", "precision"),
        ("model.width=0", "model"),
        ("callbacks={EarlyStopper: {monitor: Accuracy, dataloader_label: eval}}", "callbacks.EarlyStopper.monitor"),
        (
            "callbacks={EarlyStopper: {monitor: CrossEntropy, dataloader_label: train}}",
            "callbacks.EarlyStopper.monitor",
        ),
    ],
)
def test_what_a_run_cannot_have_is_refused(override, key, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert [mistake.partition("`")[2].partition("`")[0] for mistake in mistakes(override)] == [key]


@pytest.mark.parametrize("precision", ["fp32", "FP32"])
def test_full_precision_needs_no_gpu(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert resolve_recipe("quickstart", [f"precision={precision}"]).precision == precision


def test_a_monitor_needs_an_evaluation():
    (mistake,) = mistakes("eval_dataloader=null", "monitor=MulticlassAccuracy")

    assert mistake.startswith("`monitor`")


def test_a_name_too_long_for_a_file_is_a_mistake():
    (mistake,) = mistakes(source="a" * 300)

    assert "neither a file nor the name" in mistake
