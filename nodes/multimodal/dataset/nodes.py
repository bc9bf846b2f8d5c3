"""Captioned pictures to a dataset of interleaved prompts."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from comfy_api.latest import io

from ... import host, sockets
from . import dataset as interleaved_dataset
from . import files as multimodal_dataset_files
from . import open_detection
from .dataset import PEOPLE, ByBox, ByDetector, ByMask, Recipe

BOXES = io.Custom("BOUNDING_BOX")


class BuildMultimodalDataset(io.ComfyNode):
    """Crops bound to caption words, as MUMU bootstraps its training data (arXiv:2406.18790, section 4)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs, their ranges and what each does to the dataset."""
        return io.Schema(
            node_id="PalimpsestBuildMultimodalDataset",
            display_name="Build Multimodal Dataset",
            category="palimpsest/multimodal",
            description="Cuts out of captioned pictures what their captions name, and binds each crop to its word: "
            "the prompts of words and pictures that a multimodal encoder is trained on. Writes a folder in "
            "output/palimpsest_datasets that can be looked at and edited.",
            search_aliases=["mumu", "interleaved prompts", "grounding dino", "object crops", "training data"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, of any sizes: a batch, or a list as Load Image-Text (from Folder) gives it. "
                    "The paper has five million. All are in memory while the node runs.",
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    force_input=True,
                    tooltip="What each picture shows, in the pictures' order: a list, or one text with a line for each "
                    "picture. Only what a caption names can be cut out.",
                ),
                io.Combo.Input(
                    "detector",
                    options=multimodal_dataset_files.detector_names(),
                    tooltip="A GroundingDINO folder in models/palimpsest_detectors, which finds what the captions "
                    "name, and heads: one or two calls of it a picture. none: boxes or masks are connected instead.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="The words of the caption that boxes or masks belong to, separated by commas: one text for "
                    "all pictures, or one for each. With a detector: cut out only these. Empty: all that it finds.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the words are, in place of the detector: for each picture a batch with a mask for "
                    "each word, in the same order. A detector is then used for heads only.",
                ),
                BOXES.Input(
                    "boxes",
                    optional=True,
                    extra_dict={"forceInput": True},  # the editor would send a box of its own where none is connected
                    tooltip="Where the words are, in place of the detector: for each picture a list of boxes, one for "
                    "each word, or with labels that are words of the caption.",
                ),
                io.Image.Input(
                    "depth",
                    optional=True,
                    tooltip="A depth map for each picture, from any depth node. It joins canny and sketch as a third "
                    "way to show the whole picture without its looks.",
                ),
                io.Int.Input(
                    "least_side",
                    default=150,
                    min=1,
                    max=4096,
                    tooltip="A crop with less area than a square of so many pixels is dropped. 150 (paper) is for "
                    "pictures of 1024 px; take a seventh of your pictures' side.",
                ),
                io.Float.Input(
                    "largest_share",
                    default=0.75,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="A crop of more of its picture than this is dropped, for it would give the answer away. "
                    "0.75 (default) is the paper's.",
                ),
                io.Int.Input(
                    "most_crops",
                    default=3,
                    min=1,
                    max=8,
                    tooltip="Crops in one prompt while training, at most. 3 is the paper's; each costs its tokens in "
                    "time and memory.",
                ),
                io.Float.Input(
                    "head_share",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How often a person is shown by the head alone, where one was found. 0.7 (paper) teaches "
                    "faces; 0 shows whole people.",
                ),
                io.Float.Input(
                    "vary_share",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How often a crop is cut, mirrored, made noisy or grey before it is shown. 0.2 is the "
                    "paper's; more keeps the picture from being copied, 0 keeps details exact.",
                ),
                io.Float.Input(
                    "whole_share",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How often the whole picture stands before the prompt as edges, sketch or depth, so that "
                    "content and looks can come from different pictures. 0.3 is the paper's.",
                ),
                io.Boolean.Input(
                    "canny",
                    default=True,
                    tooltip="Draw every picture's edges. Takes no weights and little time.",
                ),
                io.Boolean.Input(
                    "sketch",
                    default=True,
                    tooltip="Draw every picture in grey strokes. Takes no weights; the paper uses a trained network.",
                ),
                io.Boolean.Input(
                    "remove_background",
                    default=False,
                    tooltip="On: what is outside a mask becomes black in its crop. Off (default): a crop shows its "
                    "whole box. Prompt with pictures of the same kind later on.",
                ),
                io.Float.Input(
                    "box_threshold",
                    default=0.35,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How sure the detector must be of a box. 0.35 (default) is its authors' value; less finds "
                    "more and errs more.",
                ),
                io.Float.Input(
                    "text_threshold",
                    default=0.25,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="How well a neighbouring word must fit a box to belong to its phrase. 0.25 (its authors' "
                    "value); more gives shorter phrases.",
                ),
                io.String.Input(
                    "people",
                    default=PEOPLE,
                    advanced=True,
                    tooltip="Words for which heads are searched for, and on which the second stage of training goes. "
                    "Name animals here to train on their faces.",
                ),
                io.String.Input(
                    "name",
                    default="dataset",
                    tooltip="The folder's name in output/palimpsest_datasets, to which a number is added. Nothing that "
                    "is there is overwritten.",
                ),
            ],
            outputs=[
                sockets.MultimodalDataset.Output(
                    display_name="dataset",
                    tooltip="For Train Multimodal Encoder, which can choose it from its list later on as well.",
                ),
                io.Image.Output(
                    display_name="contact_sheet",
                    tooltip="Up to twelve pictures with their boxes, crops, and prompts: look whether the words fit.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How many crops were kept, and why others were dropped.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images,
        captions,
        detector,
        words,
        least_side,
        largest_share,
        most_crops,
        head_share,
        vary_share,
        whole_share,
        canny,
        sketch,
        remove_background,
        box_threshold,
        text_threshold,
        people,
        name,
        masks=None,
        boxes=None,
        depth=None,
    ) -> io.NodeOutput:
        """Find, cut, write, report. Every input is a list, as the host gives it to such nodes."""
        import comfy.model_management
        import comfy.utils

        pictures = one_by_one(images)
        texts = for_each(captions, len(pictures), "captions")
        named = words_for_each(words, len(pictures))
        recipe = Recipe(least_side[0], largest_share[0], most_crops[0], head_share[0], vary_share[0], whole_share[0])
        eye = None
        if detector[0] != multimodal_dataset_files.NO_DETECTOR:
            found = open_detection.load(multimodal_dataset_files.DETECTORS.path(detector[0]))
            spoken = tuple(dict.fromkeys(word for each in named for word in each))
            eye = ByDetector(found, box_threshold[0], text_threshold[0], spoken)
        finder = chosen_finder(eye, pictures, named, masks, boxes, remove_background[0])
        depths = one_by_one(depth) if depth else []
        if depths and len(depths) != len(pictures):
            raise ValueError(
                f"depth has {len(depths)} pictures for {len(pictures)}: give one for each, or disconnect it."
            )
        kinds = [kind for kind, wanted in (("canny", canny[0]), ("sketch", sketch[0])) if wanted]
        progress, shown = comfy.utils.ProgressBar(len(pictures)), host.ProgressText(host.node_id(cls))

        def tell(done: int, text: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(done, len(pictures))
            shown.update(text)

        folder = multimodal_dataset_files.new_dataset(name[0])
        whole = False
        try:
            dataset, counted = interleaved_dataset.build(
                folder, pictures, texts, finder, recipe, kinds, depths, comma(people[0].lower()),
                eye.heads if eye else None, tell,
            )  # fmt: skip
            sheet = interleaved_dataset.overview(dataset)
            interleaved_dataset.to_image(sheet[0]).save(folder / interleaved_dataset.SHEET, quality=90)
            whole = True
        finally:
            if not whole:
                shutil.rmtree(folder, ignore_errors=True)
        report = f"{folder.name}: {interleaved_dataset.describe(dataset, counted)}"
        shown.update(report, now=True)
        return io.NodeOutput(dataset, sheet, report)


def comma(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(word for word in (part.strip() for part in text.split(",")) if word)


def one_by_one(images: list) -> list[torch.Tensor]:
    """Pictures (H, W, 3) of a list of batches: the host's own memory. Raises ValueError for none, and for NaN."""
    pictures = [picture[..., :3] for batch in images for picture in batch]
    if not pictures or not all(torch.isfinite(picture).all() for picture in pictures):
        raise ValueError("images has no pictures, or NaN in them: look at the node that makes them.")
    return pictures


def for_each(texts: list[str], pictures: int, what: str) -> list[str]:
    """A text for each picture: a list of as many, or the lines of one. Raises ValueError for another number."""
    found = list(texts)
    if len(found) == 1 and pictures != 1:
        found = [line.strip() for line in found[0].splitlines() if line.strip()]
    found = [" ".join(text.split()) for text in found]
    if len(found) != pictures or not all(found):
        filled = sum(map(bool, found))
        raise ValueError(
            f"{what} has {filled} texts for {pictures} pictures: give a line or an entry for each picture, in their "
            "order, none of them empty."
        )
    return found


def words_for_each(words: list[str], pictures: int) -> list[tuple[str, ...]]:
    """The words of each picture: one text for all, or a text or line for each. Raises ValueError for another number."""
    if len(words) == 1:
        lines = [line for line in words[0].splitlines() if line.strip()] or [""]
        words = lines if len(lines) > 1 else lines * pictures
    if len(words) != pictures:
        raise ValueError(f"words has {len(words)} texts for {pictures} pictures: give one for all, or one for each.")
    return [comma(text) for text in words]


def batches_for_each(batches: list, pictures: int, what: str) -> list:
    """An entry for each picture; a single one that holds as many as there are pictures is taken apart."""
    if len(batches) == 1 and pictures != 1 and len(batches[0]) == pictures:
        batches = [each if isinstance(each, list) else [each] for each in batches[0]] if what == "boxes" else [
            *batches[0][:, None]
        ]  # fmt: skip
    if len(batches) != pictures:
        raise ValueError(
            f"{what} has entries for {len(batches)} pictures, there are {pictures}: give one entry for each picture."
        )
    return batches


def chosen_finder(
    eye: ByDetector | None, pictures: list, named: list, masks: list | None, boxes: list | None, remove: bool
) -> Any:
    """What finds the crops: masks, boxes, or the detector. Raises ValueError for none of them, or for two."""
    if masks and boxes:
        raise ValueError("masks and boxes are both connected, and either says where the words are: disconnect one.")
    if masks:
        return ByMask(batches_for_each(masks, len(pictures), "masks"), named, remove)
    if boxes:
        entries = [
            [each] if isinstance(each, dict) else each for each in batches_for_each(boxes, len(pictures), "boxes")
        ]
        return ByBox([flat(each) for each in entries], named)
    if eye is None:
        raise ValueError(
            "nothing says where the words are: choose a detector (a GroundingDINO folder in "
            "models/palimpsest_detectors), or connect masks or boxes."
        )
    return eye


def flat(boxes: dict | list) -> list[dict]:
    """Boxes without the lists that some nodes put around those of a frame; one may come by itself."""
    return [boxes] if isinstance(boxes, dict) else [box for each in boxes for box in flat(each)]


SHELVES = [multimodal_dataset_files.DETECTORS]
NODES = [BuildMultimodalDataset]
