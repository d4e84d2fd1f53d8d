"""What is standardized, by either rule, in every model of torchvision and in fifty of timm, as a Markdown table.

    python benchmarks/selection_of_models.py > table.md

The models have random weights and, where their constructors allow it, no memory. ``candidates`` are all
convolutions, ``all`` and ``normalized`` how many of them end up standardized under the two values of `layers`,
``undecided`` those that ``normalized`` leaves out because it cannot tell, and ``order`` how the order of execution was
found without an input. The last column is the time that finding all this took, once.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import time
from collections import Counter

import torch
import torchvision

from ws_algorithm.inspection import records_of
from ws_algorithm.recipes.named_models import build_named_model
from ws_algorithm.selection import Rules, select_convolutions

# Residual networks of all kinds, separable and gated ones, attention, and layers with a standardization of their own
TIMM = """
    botnet26t_256 coat_tiny convmixer_768_32 convnext_atto convnextv2_atto cspdarknet53 densenetblur121d dla60_res2net
    dm_nfnet_f0 dpn68 edgenext_xx_small efficientnet_b0 efficientnet_b0_gn efficientnet_cc_b0_4e fastvit_t8 fbnetc_100
    ghostnetv2_100 halonet26t hardcorenas_a hrnet_w18_small inception_resnet_v2 lambda_resnet26t lcnet_050
    legacy_xception levit_conv_128s maxvit_nano_rw_256 mobilenetv3_large_100 mobilenetv4_hybrid_medium mobileone_s0
    mobilevit_xxs nf_resnet50 poolformer_s12 regnety_008 repvgg_a0 resnest14d resnet50d resnetv2_50 resnetv2_50x1_bit
    resnext50_32x4d selecsls42b seresnet50 skresnet18 swin_tiny_patch4_window7_224 tinynet_e tresnet_m vgg11_bn
    visformer_tiny vit_small_r26_s32_224 volo_d1_224 xception41p
""".split()


def sources() -> list[str]:
    """The models, by library and name; torchvision's quantized copies of seven of its own are left out."""
    names = [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in TIMM]


def row(source: str) -> str:
    """The line of one model."""
    model = build_named_model(source)
    start = time.perf_counter()
    selections = [select_convolutions(model, Rules(layers=layers)) for layers in ("all", "normalized")]
    seconds = (time.perf_counter() - start) / 2
    everything, normalized = map(records_of, selections)
    undecided = sum(choice.place.undecided for choice in selections[1].choices)
    orders = Counter(record.order for record in everything)
    order = ", ".join(orders) if len(orders) < 2 else ", ".join(f"{count} {name}" for name, count in orders.items())
    counts = [
        len(everything),
        *(sum(record.standardized for record in records) for records in (everything, normalized)),
    ]
    cells = [f"`{source}`", *map(str, counts), str(undecided), order or "-", f"{seconds:.2f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    logging.disable(logging.WARNING)
    versions = (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {importlib.metadata.version('timm')}"
    )
    print(f"{versions}, {torch.get_num_threads()} thread(s) of a CPU, one run", file=sys.stderr)
    print("| model | candidates | all | normalized | undecided | order | time |\n|---|---|---|---|---|---|---|")
    for source in sources():
        print(row(source), flush=True)


if __name__ == "__main__":
    main()
