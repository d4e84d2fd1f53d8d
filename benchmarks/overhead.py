"""What Weight Standardization costs in time and memory: ours, Composer's, the authors' layer, timm's and mmcv's.

    python benchmarks/overhead.py --preset targets --output overhead
    python benchmarks/overhead.py --preset targets --output overhead --device cuda

The same as ``ws-algorithm benchmark``, from a checkout, without installing it; ``--help`` lists the options. It needs
torch, torchvision and, for ``--output``, matplotlib; of the others it measures those that are installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ws_algorithm.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
