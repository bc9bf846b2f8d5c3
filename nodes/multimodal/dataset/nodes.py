"""Captioned pictures to a dataset of interleaved prompts."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io

from ... import host, inputs, plots, sockets
from . import files, lists
from .building import PEOPLE, DatasetSettings, build_dataset, describe_dataset
from .contact_sheet import overview
from .filtering import filtering
from .filters import PictureFilter, chosen_score, chosen_text
from .finders import ByDetector
from .folder import SHEET
from .open_detection import load_detector
from .synthetic import SyntheticPrompts
from .text import comma

BOXES = io.Custom("BOUNDING_BOX")


class BuildMultimodalDataset(io.ComfyNode):
    """Crops bound to caption words, as MUMU bootstraps its training data (arXiv:2406.18790, section 4)."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
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
                    options=files.detector_names(),
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
                    "min_side",
                    default=150,
                    min=1,
                    max=4096,
                    tooltip="A crop with less area than a square of so many pixels is dropped. 150 (paper) is for "
                    "pictures of 1024 px; take a seventh of your pictures' side.",
                ),
                io.Float.Input(
                    "max_share",
                    default=0.75,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="A crop of more of its picture than this is dropped, for it would give the answer away. "
                    "0.75 (default) is the paper's.",
                ),
                io.Int.Input(
                    "max_crops",
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
                    "is there is overwritten. Folders (mine/cats) and dates (%date:yyyy-MM-dd%) are understood.",
                ),
                *filtering(),
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
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, images, captions, words=("",), masks=None, boxes=None, depth=None, **chosen) -> io.NodeOutput:
        """Every input is a list, as the host gives it to such nodes."""
        judged = {name: chosen.pop(name, None) for name in ("text_masks", "scores", "clip_vision", "clip")}
        settings = DatasetSettings.of({name: values[0] for name, values in chosen.items()})
        pictures = lists.one_by_one(images)
        texts = lists.captions_for_each(captions, len(pictures))
        named = lists.words_for_each(words, len(pictures))
        detector = chosen_detector(settings, named)
        finder = lists.chosen_finder(detector, named, masks, boxes, settings.remove_background)
        depths = lists.depth_for_each(depth, len(pictures))
        keep = chosen_filter(settings, len(pictures), detector, **judged)
        finder.check(texts)
        shown = host.ProgressText(host.node_id(cls))
        with files.new_dataset(settings.name) as folder:
            dataset, counted = build_dataset(
                folder,
                pictures,
                texts,
                finder,
                settings.recipe,
                settings.wholes,
                depths=depths,
                people=comma(settings.people.lower()),
                heads=detector.heads if detector else None,
                keep=keep,
                tell=teller(len(pictures), shown),
            )
            sheet = overview(dataset)
            plots.to_image(sheet[0]).save(folder / SHEET, quality=90)
        name = files.name_of(folder)
        report = f"{name}: {describe_dataset(dataset, counted)}"
        return io.NodeOutput(dataset, sheet, report, ui=host.told(cls, report, saved=[name]))


def chosen_detector(settings: DatasetSettings, words: list[tuple[str, ...]]) -> ByDetector | None:
    """The detector of the settings, which finds each picture's words; None where none is chosen."""
    if settings.detector == files.NO_DETECTOR:
        return None
    detector = load_detector(files.DETECTORS.path(settings.detector))
    return ByDetector(detector, settings.box_threshold, settings.text_threshold, words)


def chosen_filter(
    settings: DatasetSettings,
    pictures: int,
    detector: ByDetector | None,
    *,
    text_masks: list | None,
    scores: list | None,
    clip_vision: list | None,
    clip: list | None,
) -> PictureFilter:
    """Which of so many pictures are taken, by the settings and what is connected for it."""
    vision, text = (given[0] if given else None for given in (clip_vision, clip))
    masks = lists.masks_for_each(text_masks, pictures, "text_masks") if text_masks else []
    return PictureFilter(
        settings.limits,
        chosen_score(settings.limits, lists.scores_for_each(scores, pictures), vision, text),
        chosen_text(settings.limits, masks, detector),
        comma(settings.people.lower()),
    )


def teller(pictures: int, shown: host.ProgressText) -> Callable[[int, str], None]:
    """Shows how many of so many pictures are done, and stops when the run is cancelled."""
    import comfy.model_management
    import comfy.utils

    progress = comfy.utils.ProgressBar(pictures)

    def tell(done: int, text: str) -> None:
        host.stop_if_cancelled()
        progress.update_absolute(done, pictures)
        shown.update(text)

    return tell


SHELVES = [files.DETECTORS]
NODES = [SyntheticPrompts, BuildMultimodalDataset]
