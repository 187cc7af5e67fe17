"""Make torchvision importable: a pytest plugin, since the import must come before transformers'.

Most processors need torchvision, whose package is built for another torch than the CPU build that the tests use. Only its image transforms
are used here, which are Python. So it is installed beside the other packages, in a folder that no other test sees, and the operators of its
compiled library are declared if they are missing.
"""

import sys
from pathlib import Path

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare() -> None:
    """Import torchvision."""
    sys.path.append(str(Path(sys.prefix) / "torchvision"))
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


declare()
