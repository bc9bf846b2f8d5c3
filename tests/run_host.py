"""Start a ComfyUI checkout, also on a CPU build of torch.

    python run_host.py <ComfyUI>/main.py [host options]

PyPI's torchvision wheel for Linux is compiled for CUDA, and beside a torch without CUDA its compiled part does not
load; `import torchvision` then fails because two operators that it decorates are unknown. The host needs only its
Python part, so those two operators are declared here. Where the compiled part loads, nothing is changed.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch

_declared = []  # torch forgets the declarations when the Library object goes


def declare_missing_operators() -> None:
    """Declare torchvision::nms and torchvision::qnms unless torchvision's own library brings them."""
    if torch.version.cuda is not None or _declared or _compiled_part_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return True  # nothing to mend
    folder = Path(spec.origin).parent
    libraries = [path for path in folder.glob("_C*") if path.suffix in {".so", ".pyd"}]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except (OSError, RuntimeError):
        return False
    return bool(libraries)


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    declare_missing_operators()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
