"""Lets torchvision's ordinary wheel be imported beside a CPU build of torch (development and tests only).

The wheel's compiled part is a CUDA build and cannot load there, so the operators that its Python part expects are
declared, never implemented, right before torchvision is first looked for. Nothing happens with a CUDA build of torch.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

_kept = []


class _Declare:
    """A finder that finds nothing: being asked for torchvision is the moment to act."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(_Declare)  # type: ignore[arg-type]
            import torch

            if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _kept.append(library)


def install() -> None:
    try:
        wheel = version("torchvision")
    except PackageNotFoundError:
        return
    if "+cpu" not in wheel and _Declare not in sys.meta_path and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _Declare)  # type: ignore[arg-type]


install()
