"""The shelf of templates: their order, which is that of their numbers and of README's table, by technique.

A template is put in at its line and everything else follows by `python dev.py make workflows readme`: numbers, names of
files, README's rows. One that no line has stands behind those that have one, before those that nobody can run for want
of published weights, with the one that draws pictures to train such weights on.
"""

from __future__ import annotations

from collections.abc import Iterable

Row = tuple[str, dict[str, str]]

# What the templates of a row are for, and each title with what README calls it.
SHELF: tuple[Row, ...] = (
    ("see above", {
        "Change what a subject does (KV Inversion)": "Change what a subject does"}),
    ("from a saved file", {
        "Edit again from a file (KV Inversion)": "Edit again",
        "Many prompts from one file (KV Inversion)": "Many prompts"}),
    ("each in its mask", {
        "Two photos in one picture (KV Inversion)": "Two photos"}),
    ("the subject found by its words; a pose given", {
        "Another place, the subject found by its words (KV Inversion)": "Another place",
        "An action that the words do not reach (pose ControlNet)": "An action"}),
    ("words act in a mask", {
        "Recolour one object by a word (Regions)": "Recolour",
        "Replace the background by words (Regions)": "Replace the background",
        "Two words in two regions (Regions)": "Two words"}),
    ("finds a word in a photo", {
        "Make a mask by a word (Regions)": "Make a mask by a word"}),
    ("one weight a layer", {
        "Learn how much of the photo flows back (Regions)": "Learn how much flows back",
        "Blend again with learned weights (Regions)": "Blend again"}),
    ("behind any edit of any pack", {
        "Keep everything else after any edit (Regions)": "Keep everything else"}),
    ("a context adapter", {
        "Align a picture with its prompt (Context)": "Align a picture",
        "Draw with a saved context adapter (Context)": "Again"}),
    ("frames inverted together", {
        "Edit a clip by text (Context)": "Edit a clip",
        "Edit a clip by text, with context (ContextDiff)": "With context"}),
    ("a layout's context adapter", {
        "Edit by a prompt, the layout held (ContextDiff)": "Edit by a prompt"}),
    ("InstructPix2Pix, MGIE", {
        "Edit by an instruction (MGIE)": "Edit by an instruction",
        "Instruction with a mask (InstructPix2Pix, Feature Blend, Cross-Attention Mask)": "With a mask",
        "Your own instruction model (Train Instruction)": "Your own model"}),
    ("a LoRA from captioned pictures", {
        "Teach a style with your pictures (LoRA)": "Teach a style",
        "A style beside KV Inversion and a mask (LoRA)": "Beside KV"}),
    ("exact text", {
        "Write on a photo and read it back (Text)": "Write on a photo",
        "Write on a sign (Exact Text)": "On a sign",
        "Change the text in a photo (Exact Text)": "Change the text",
        "Teach exact text with your pictures (Exact Text)": "Teach it",
        "Your style and exact text (Exact Text)": "In your style"}),
    ("words or phrases in regions, on transformers", {
        "Words in regions on Z-Image (Cross-Attention Mask)": "Z-Image",
        "Words in regions on Qwen-Image (Cross-Attention Mask)": "Qwen-Image",
        "A phrase for each region on FLUX (Phrase in Region)": "FLUX.1",
        "A phrase for each region on FLUX.2 Klein (Phrase in Region)": "FLUX.2 Klein",
        "Two characters, each in its half, on Anima (Phrase in Region)": "Anima",
        "Two phrases in a clip on Wan (Phrase in Region)": "a clip on Wan"}),
    ("a photo on a flow model", {
        "Edit a photo with a flow model (FlowEdit)": "Edit a photo",
        "Edit a photo, its place kept, on SD 3.5 (Feature Blend)": "Its place kept (SD 3.5)",
        "Re-pose a subject on a flow model (KV Inversion)": "Re-pose",
        "Edit again from a file on a flow model (KV Inversion)": "Again"}),
)  # fmt: skip
WITHOUT_WEIGHTS: tuple[Row, ...] = (
    ("pictures as words; see Limits", {
        "Two pictures in a sentence (Multimodal)": "Two pictures",
        "Style from a picture (Multimodal)": "Style",
        "Re-pose a subject shown by a picture (Multimodal)": "Re-pose",
        "Train a connector on your own pictures (Multimodal)": "Training",
        "Synthetic pairs for a multimodal encoder (Multimodal)": "Data"}),
)  # fmt: skip


def rows(titles: Iterable[str]) -> list[Row]:
    """The rows of all these templates, with one more for each that no line has."""
    listed = {title for _, named in (*SHELF, *WITHOUT_WEIGHTS) for title in named}
    others = [("", {title: title}) for title in sorted({*titles} - listed)]
    return [*SHELF, *others, *WITHOUT_WEIGHTS]


def numbered(titles: Iterable[str]) -> dict[str, str]:
    """title -> name: "05 Another place ...", in the shelf's order."""
    titles = set(titles)
    order = [title for _, named in rows(titles) for title in named]
    if missing := [title for title in order if title not in titles]:
        raise ValueError(f"tests/graphs/shelf.py has {missing[0]!r}, which no graph.py describes")
    return {title: f"{number:02d} {title}" for number, title in enumerate(order, start=1)}
