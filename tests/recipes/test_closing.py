import gc
import weakref
from pathlib import Path

from ws_algorithm.recipes.train import train


def test_nothing_keeps_what_was_trained(tmp_path: Path):
    overrides = ["root=synthetic", "max_duration=1ba", "global_train_batch_size=2", "global_eval_batch_size=2"]
    overrides += ["eval_subset_num_batches=1", f"save_folder={tmp_path / 'run'}"]
    trainer = train("cifar10/resnet20_gn_ws", overrides)
    kept = [weakref.ref(part) for part in (trainer, trainer.state.model, trainer.state.optimizers[0])]

    del trainer
    gc.collect()

    assert [part() for part in kept] == [None, None, None]
