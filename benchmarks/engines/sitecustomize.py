"""Make torchvision importable in vLLM's environment on a CPU: copied into its site-packages, where Python imports it at the start.

torchvision's package is built for another torch. Its import fails, because its compiled operators are missing. Only its image transforms
are used, which are Python.
"""

import sys
from importlib.abc import MetaPathFinder


class _Operators(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            type(self).library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return


sys.meta_path.insert(0, _Operators())
