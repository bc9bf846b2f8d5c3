"""Text controls on disk: AnyText's checkpoints as others save them, and this pack's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.text_recognition import CHANNELS, WIDTH, Recogniser
from .. import exact_text, host
from ..exact_text import TextEmbedder
from ..files import Shelf
from ..headers import Header, Tensors
from ..quoting import quoted
from . import names
from .control import Layout, TextControl, build

CONTROLS = Shelf(
    folder="palimpsest_text_control",
    format="palimpsest.text_control",
    version=1,
    what=("a text control", "Train Text Control"),
    example="my signs",
    put="anytext_checkpoints",
    room="keep fewer files on the way (save_every 0)",
)
FOLDERS = (CONTROLS.folder, "controlnet", "checkpoints")
NOTHING = "no file: put AnyText v1.1 into models/palimpsest_text_control"
SAME = "(the same file)"
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
CONVERTER = "tests/recipes/anytext_to_safetensors.py"
PUBLISHED = Layout()
NECK = CHANNELS * WIDTH // 8  # numbers of a line that a projection reads
KINDS = ("F16", "BF16", "F32")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


# ------------------------------------------------------------------------------------------------ which files there are


def listed() -> list[str]:
    """Files that may hold a text control: ours, and behind their folder those whose name says AnyText elsewhere."""
    import folder_paths

    found = []
    for folder in FOLDERS:
        if folder in folder_paths.folder_names_and_paths:
            here = folder_paths.get_filename_list(folder)
            own = folder == CONTROLS.folder
            found += here if own else [f"{folder}/{name}" for name in here if "anytext" in name.lower()]
    return found


def path_of(file: str) -> str:
    """Where a listed file lies. Raises ValueError for a name of no such file."""
    import folder_paths

    folder, _, name = file.partition("/")
    path = folder_paths.get_full_path(CONTROLS.folder, file)
    if path is None and folder in FOLDERS[1:]:
        path = folder_paths.get_full_path(folder, name)
    if path is None:
        have = ", ".join(listed()) or "none"
        raise ValueError(
            f"there is no file {quoted(file)}, there is {have}: put AnyText v1.1 (.safetensors) into "
            f"models/{CONTROLS.folder}, and refresh."
        )
    return path


def fingerprint(file: str) -> str:
    """What changes when a file does."""
    try:
        return f"{file} {os.path.getmtime(path_of(file))}"
    except (ValueError, OSError):
        return f"{file} missing"


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, eq=False)
class Parts:
    """What a file has. control: the weights by the host's names; projection and reader: by ours; info: its training."""

    layout: Layout
    control: dict[str, Tensor]
    projection: dict[str, Tensor]
    reader: dict[str, Tensor]
    info: dict[str, Any]

    def described(self) -> str:
        """What it has, in words."""
        numbers = sum(tensor.numel() for tensor in self.control.values())
        parts = [f"control {numbers / 1e6:.1f} M"] if self.control else []
        norm = " and LayerNorm" if "norm_weight" in self.projection else ""
        parts += [f"embeddings by Linear{norm}"] if self.projection else []
        parts += ["its own recogniser"] if self.reader else []
        return ", ".join(parts)


def read(path: str) -> Parts:
    """The parts of a file, the rest of it unread. Raises ValueError that says what is wrong with it."""
    name = os.path.basename(path)
    if path.lower().endswith(PICKLED):
        raise ValueError(
            f"{name} is a pickled file, which can run any program when it is opened: convert it once with "
            f"python {CONVERTER} {name} (from Palimpsest's repository; it reads weights only), and put the "
            f".safetensors file into models/{CONTROLS.folder}."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return parts_of(Header(file.metadata() or {}), Tensors(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is cut off or damaged ({error}): copy it again from its source.") from error
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be used: {str(error).rstrip('.')}.") from error


def parts_of(header: Header, tensors: Tensors) -> Parts:
    """The parts of a file by its names. Raises ValueError for AnyText2, and for a file that has none of them."""
    require_first_version(tensors)
    own = header.get("format") == CONTROLS.format
    if own:
        CONTROLS.require_own("it", header)
    layout = layout_of(header) if own else PUBLISHED
    found = Parts(layout, control_in(tensors, layout), projection_in(tensors), reader_in(tensors), information(header))
    if not (found.control or found.projection):
        raise ValueError(
            f"none of its {len(tensors)} tensors is of AnyText's control or embeddings "
            f"({quoted(min(tensors, default=''))} is one of them): it is another kind of file"
        )
    for part in (found.control, found.projection, found.reader):
        odd = next((key for key, tensor in part.items() if not host.is_finite(tensor)), None)
        if odd:
            raise ValueError(f"its {odd} holds NaN or infinite values")
    return found


def require_first_version(tensors: Mapping[str, Any]) -> None:
    """Raise ValueError for AnyText2."""
    mark = next((name for name in tensors if names.V2_MARKS.search(name)), None)
    if mark:
        raise ValueError(
            f"it is AnyText2 (it has {quoted(mark)}), whose U-Net carries attention layers of its own and whose text "
            "network runs once on no picture: neither fits into a CONTROL_NET for any SD 1.5 checkpoint. Take AnyText "
            "v1.1"
        )


def layout_of(header: Header) -> Layout:
    """The layout in the header of one of our files."""
    layout = header.record("layout", Layout, num_heads=(-1, 1 << 10), num_head_channels=(-1, 1 << 10))
    layout.require_sane()
    return layout


def information(header: Header) -> dict[str, Any]:
    """What a training wrote about itself; nothing for files of others."""
    return header.info() if header.get("format") == CONTROLS.format else {}


def control_in(tensors: Tensors, layout: Layout) -> dict[str, Tensor]:
    """The control's weights by the host's names; none where the file has no control."""
    here = [name for name in tensors if name.startswith(names.CONTROL)]
    given = {name: names.control_name(name.removeprefix(names.CONTROL)) for name in here}
    if not given and any("controlnet_cond_embedding." in name for name in tensors):
        given = dict(names.from_diffusers(tensors, asdict(layout)))
    if not given:
        return {}
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in build(layout, torch.float32, "meta").state_dict().items()}
    missing = sorted(wanted.keys() - set(given.values()))
    if missing:
        raise ValueError(f"its control lacks {len(missing)} of {len(wanted)} weights, {quoted(missing[0])} for one")
    for theirs, ours in given.items():
        if ours in wanted:
            tensors.require(theirs, *wanted[ours], kinds=KINDS)
    return {ours: tensors[theirs] for theirs, ours in given.items() if ours in wanted}


def projection_in(tensors: Tensors) -> dict[str, Tensor]:
    """The projection's weights by our names; none where the file has no projection."""
    for known in names.PROJECTIONS:
        if all(name in tensors for name in known.values()):
            width = tensors.shapes[known["weight"]][0]
            for ours, theirs in known.items():
                tensors.require(theirs, *((width, NECK) if ours == "weight" else (width,)), kinds=KINDS)
            return {ours: tensors[theirs].float() for ours, theirs in known.items()}
    return {}


def reader_in(tensors: Tensors) -> dict[str, Tensor]:
    """The recogniser's weights by our names; none where the file has no recogniser."""
    given = {
        name: names.reader_name(name.removeprefix(names.READER)) for name in tensors if name.startswith(names.READER)
    }
    given |= {name: name.removeprefix(names.OWN_READER) for name in tensors if name.startswith(names.OWN_READER)}
    if not given:
        return {}
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_reader().state_dict().items()}
    missing = sorted(name for name in wanted.keys() - set(given.values()) if not name.endswith("num_batches_tracked"))
    if missing:
        raise ValueError(f"its recogniser lacks {len(missing)} weights, {quoted(missing[0])} for one")
    plain = {theirs: ours for theirs, ours in given.items() if not ours.endswith("num_batches_tracked")}
    for theirs, ours in plain.items():
        if ours not in wanted:
            raise ValueError(f"its recogniser has {quoted(theirs)}, which PP-OCRv3's has not")
        tensors.require(theirs, *wanted[ours], kinds=KINDS)
    return {ours: tensors[theirs].float() for theirs, ours in plain.items()}


# ------------------------------------------------------------------------------------------------- as the host has it


def empty_reader() -> Recogniser:
    """The recogniser's network without weights."""
    with torch.device("meta"):
        return Recogniser()


def control_of(parts: Parts) -> TextControl:
    """A CONTROL_NET of a file's control, in the precision that the host runs it in."""
    import comfy.model_management as management
    import comfy.ops

    kind = next(iter(parts.control.values())).dtype
    dtype = management.unet_dtype(model_params=-1, supported_dtypes=DTYPES, weight_dtype=kind)
    cast = management.unet_manual_cast(dtype, management.get_torch_device())
    operations = host.whole(comfy.ops.pick_operations(dtype, cast))
    network = build(parts.layout, dtype, management.unet_offload_device(), operations)
    network.load_state_dict(parts.control)
    return TextControl.of(network, cast)


def embedder_of(parts: Parts) -> TextEmbedder:
    """A TEXT_EMBEDDER of a file's projection, with its own recogniser or the one that ships."""
    if not parts.reader:
        return TextEmbedder(exact_text.shipped_recogniser(), parts.projection)
    reader = empty_reader()
    counts = {name: torch.tensor(0) for name in reader.state_dict() if name.endswith("num_batches_tracked")}
    reader.load_state_dict(counts | parts.reader, assign=True)
    return TextEmbedder(reader.requires_grad_(False).eval(), parts.projection)
