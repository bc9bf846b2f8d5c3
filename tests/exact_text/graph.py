"""The workflow of Text Lines and Read Text: lines on a photo, read back. It needs no model."""

from __future__ import annotations

from graphs.parts import COFFEE, WIDE, graph, group, load_image, note, preview, save

TITLE = "Write on a photo and read it back (Text)"
LINES = "COFFEE\nwhenever you like"

START = """## Write on a photo and read it back

1. **lines**: the text, one line in each row. They stand down the middle of the photo.
2. For places of your own: right-click the photo, *Open in Mask Editor*, paint one part for each line, and connect the
   photo's MASK to *mask*.
3. Queue. The preview shows what stands where; *Read Text* reads it as a stranger would.

No model is needed. The same lines go into a network that writes them in the picture's own style (AnyText):
*text_lines* is what it is given.

**To read a photo of your own**: connect *Load Image* to *image* of Read Text, its mask to *mask*, and take *text_lines*
off. Without a mask the whole picture is one line."""

HELP = """## Not right yet?

- **A letter is missing**: the error names it. Choose another *font*, or put one into models/palimpsest_fonts.
- **Slanted text**: *direction* level. Upright parts are written downwards.
- **Lines in the wrong places**: *order*; or boxes instead of a mask, with *order* as given.
- **Letters too far apart**: *spacing* 0.
- **Read wrongly**: *grow* 4 where letters touch the edge of their place; *compare* lets capitals or spaces pass."""


def text_lines() -> dict:
    return {
        "type": "PalimpsestTextLines", "size": [WIDE, 620],
        "widgets": {"lines": LINES}, "inputs": {"image": "image.IMAGE"},
    }  # fmt: skip


def read_text() -> dict:
    return {
        "type": "PalimpsestReadText", "size": [WIDE, 620],
        "inputs": {"image": "lines.preview", "text_lines": "lines.text_lines"},
    }  # fmt: skip


def write_and_read() -> dict:
    return graph(
        {"start": note("Start here", START, 560), "help": note("Not right yet?", HELP, 420)},
        group("1  Your photo", "yours", {"image": load_image(COFFEE, "Your photo")}),
        group("2  Lines in their places", "learned", {"lines": text_lines()}, {
            "glyphs": preview("What a network is shown", "lines.glyphs"),
            "save": save("The photo with its lines", "lines.preview"),
        }),
        group("3  Read", "edit", {"read": read_text()}),
    )  # fmt: skip


GRAPHS = {TITLE: write_and_read}
