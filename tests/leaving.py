"""How one of several processes ends its script."""

from torch import distributed


def leave_together() -> None:
    """Wait for the other processes, then end the threads of the process group.

    A process that ends while they run may be aborted at its very end ("terminate called without an active exception").
    """
    distributed.barrier()
    distributed.destroy_process_group()
