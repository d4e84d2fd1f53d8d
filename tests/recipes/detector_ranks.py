"""Two steps of a small Mask R-CNN, which leave nothing to chance, on one process or on two.

As a program, ``detector_ranks.py FOLDER``: one of the processes. It writes its weights to ``RANK.pt`` there.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accumulating_runs import weights
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist
from leaving import leave_together
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.models.small_detectors import batch_of, detector, in_double
from ws_algorithm import WeightStandardization
from ws_algorithm.recipes.image_lists import collate, count_images, split_batch

TIMEOUT = 60.0  # seconds that a collective waits for the other process
SEED = 5

# The first process has the first and the third image, the second one the image without objects and the fourth
OBJECTS = [[[4, 4, 40, 40]], [], [[10, 10, 60, 50], [30, 20, 60, 60]], [[5, 5, 50, 60]]]

# More samples than there are anchors or proposals: all of them are taken, and no image is padded
EVERYTHING: dict[str, Any] = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
EVERYTHING |= {"min_size": 32, "max_size": 32, "rpn_post_nms_top_n_train": 3}


class Pairs(Dataset):
    """Images and their targets in float64, the same at every call."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        images, targets = in_double(batch_of(*OBJECTS, height=64, width=64))
        self.pairs = list(zip(images, targets, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def train() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after two steps of two images, in micro-batches of one or one on each process."""
    torch.manual_seed(SEED)
    model = detector(**EVERYTHING).double()
    data = Pairs()
    loader = DataLoader(
        data, 2 // dist.get_world_size(), sampler=dist.get_sampler(data, shuffle=False), collate_fn=collate
    )
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader, split_batch=split_batch, get_num_samples_in_batch=count_images),
        algorithms=[WeightStandardization(layers="normalized", once_per_step=True)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        max_duration="2ba",
        device_train_microbatch_size=1,
        device="cpu",
        seed=SEED,
        progress_bar=False,
        dist_timeout=TIMEOUT,
    )
    before = weights(model)
    trainer.fit()
    trainer.close()
    return before, weights(model)


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    dist.initialize_dist("cpu", timeout=TIMEOUT)
    torch.save(train()[1], Path(folder) / f"{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()
