"""The end of a Trainer, after which its memory can be used again."""

from __future__ import annotations

import atexit

from composer import Trainer
from composer.callbacks import CheckpointSaver
from torch.distributed.checkpoint import state_dict


def close_trainer(trainer: Trainer, *, alone: bool = False) -> None:
    """Close a Trainer, and let go of all that Composer and torch keep of it: model, optimizer and data.

    Args:
        trainer: What has trained or evaluated.
        alone: Whether other processes may not come to this point, so that none is waited for.
    """
    if alone:
        trainer.engine.close()
    else:
        trainer.close()
    atexit.unregister(trainer.engine._close)  # it has run; Composer leaves it registered, with the state as argument
    for function in vars(state_dict).values():  # torch remembers the models whose parameters it has named
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    for callback in trainer.state.callbacks:
        if isinstance(callback, CheckpointSaver):
            callback.tmp_dir_for_symlink.cleanup()  # it is left to the garbage collector, which warns
