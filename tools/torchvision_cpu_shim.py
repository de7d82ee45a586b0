"""Let a CUDA build of torchvision be imported under a CPU build of torch.

The CUDA build's compiled library cannot load there, and torchvision then fails on two operators that nobody declared.
This module declares them just before the first `import torchvision`. Run as a program it copies itself into
site-packages beside a `.pth` file, because every process needs it: Ray actors and engine children too. It does nothing
on CUDA torch, nor with a CPU build of torchvision (from PyTorch's own index).
"""

import ctypes
import importlib.abc
import importlib.machinery
import pathlib
import shutil
import sys
import sysconfig
from typing import Any

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareBeforeImport(importlib.abc.MetaPathFinder):
    library: Any = None  # keeps the declarations alive

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not _compiled_library_loads():
                _DeclareBeforeImport.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _DeclareBeforeImport.library.define(operator + _SIGNATURE)
        return


def _compiled_library_loads() -> bool:
    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    try:
        for folder in (spec and spec.submodule_search_locations) or ():
            for library in pathlib.Path(folder).glob("_C*.so"):
                ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _install() -> None:
    site_packages = pathlib.Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, site_packages / "torchvision_cpu_shim.py")
    (site_packages / "torchvision_cpu_shim.pth").write_text("import torchvision_cpu_shim\n")


if __name__ == "__main__":
    _install()
else:
    sys.meta_path.insert(0, _DeclareBeforeImport())
