"""Where words act: heat map, mask, leakage."""

from __future__ import annotations

import latent_preview
from comfy_api.latest import io

from .. import host, inputs, sockets
from .drawing import drawn
from .finding import FindSettings, find_words
from .reading import EVERY_LEVEL, LEVELS, NORMALISE, ReadSettings, read
from .recorder import LAYERS, RecordSettings, record_words


class AttentionMap(io.ComfyNode):
    """Record during sampling where words act."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestAttentionMap",
            display_name="Attention Map",
            category="palimpsest/regions",
            description="Watches where words act while the picture is sampled, without changing it. Read the record "
            "with Read Attention Map behind the sampler.",
            search_aliases=[
                "daam",
                "cross attention",
                "heatmap",
                "word map",
                "attention visualization",
                "leakage",
                "visualize",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that samples. Masks of Cross-Attention Mask are seen whether they come before "
                    "or after this node.",
                ),
                sockets.Tokens.Input(
                    "tokens", tooltip="The words to watch, from Select Words. Each gets a map of its own."
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="all",
                    advanced=True,
                    tooltip="Which cross-attention layers are watched. all (default) shows things as a whole; decoder "
                    "is where words act most on what is drawn, encoder is rougher. In a transformer they are the "
                    "first, second and last third of its layers.",
                ),
                *inputs.percents(
                    start="When recording begins, as a share of the sampling. 0 records from the first step; the "
                    "reader can leave steps out later.",
                    end="When recording ends, as a share of the sampling. A record takes about 22 kB a word, step and "
                    "picture (SD 1.5 at 512 px, SDXL at 1024 px), and recording adds about half a percent of "
                    "computing.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The same model, watched: give it to the sampler. Its pictures do not change by one bit.",
                ),
                sockets.AttentionRecord.Output(
                    display_name="record",
                    tooltip="For Read Attention Map. It is filled when the sampler runs.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, tokens, **chosen) -> io.NodeOutput:
        return io.NodeOutput(*record_words(model, tokens, RecordSettings.of(chosen)))


class FindWords(io.ComfyNode):
    """Ask the model where words are in a picture that was inverted."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestFindWords",
            display_name="Find Words in Picture",
            category="palimpsest/regions",
            description="Shows where the words of a prompt are in a real picture, without sampling: the model looks at "
            "the inverted picture a few times. Read Attention Map makes the record a mask by word.",
            search_aliases=[
                "mask by word",
                "text to mask",
                "segment by prompt",
                "daam",
                "cross attention",
                "diffedit",
                "mask from text",
                "segment",
                "auto mask",
                "find object",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was inverted with."),
                inputs.trajectory("The picture, from Invert Picture. A batch is searched picture by picture."),
                sockets.Tokens.Input("tokens", tooltip="The words to look for, from Select Words."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The positive output of the same Select Words. A prompt that describes the whole picture "
                    "tells things apart best.",
                ),
                io.Int.Input(
                    "looks",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="At how many noise levels the model looks at the picture. 3 to 10: more give smoother "
                    "maps, and each costs one model call.",
                ),
                *inputs.percents(
                    start="The noisiest look, as a share of the trajectory's steps. Below 0.3 the picture is hardly "
                    "there yet and maps get rough.",
                    end="The clearest look, as a share of the trajectory's steps. 1 is the last step before the "
                    "finished picture.",
                    default_start=0.5,
                    advanced=True,
                ),
            ],
            outputs=[
                sockets.AttentionRecord.Output(
                    display_name="record",
                    tooltip="For Read Attention Map, whose samples input can stay empty then.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, trajectory, tokens, positive, **chosen) -> io.NodeOutput:
        settings = FindSettings.of(chosen)
        progress = latent_preview.prepare_callback(model, min(settings.looks, trajectory.steps))
        return io.NodeOutput(find_words(model, trajectory, tokens, positive, settings, progress))


class ReadAttentionMap(io.ComfyNode):
    """Read a record as heat maps, mask and leakage."""

    @classmethod
    @inputs.completed()
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PalimpsestReadAttentionMap",
            display_name="Read Attention Map",
            category="palimpsest/regions",
            description="Shows where words acted as a heat map over the picture, makes a mask of it, and measures how "
            "much of a word leaks out of a mask of yours.",
            search_aliases=[
                "daam",
                "heatmap",
                "mask by word",
                "text to mask",
                "leakage",
                "attention visualization",
                "mask from text",
                "segment",
            ],
            inputs=[
                sockets.AttentionRecord.Input("record", tooltip="From Attention Map or Find Words in Picture."),
                io.Latent.Input(
                    "samples",
                    optional=True,
                    tooltip="The sampler's own output latent: it tells which run to read, and that sampling comes "
                    "first. Leave it empty for a record of Find Words in Picture.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The pictures to draw the maps on, and whose size they get. Without it the maps are drawn "
                    "alone, at 8 pixels to a latent's one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the words should act, white: the leakage is measured against it. One for all "
                    "pictures, or one for each.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Which of the recorded words to read, as written in Select Words, separated by commas. "
                    "Empty reads all; the mask is then where any of them acts.",
                ),
                io.Combo.Input(
                    "levels",
                    options=[EVERY_LEVEL, *LEVELS],
                    default=EVERY_LEVEL,
                    tooltip="Which resolutions of the network are averaged. all (default) finds things whole; finer "
                    "ones have sharper edges and more specks, coarser ones (1/4 in SD 1.5 at 512 px) know best what is "
                    "what.",
                ),
                *inputs.percents(
                    start="The first step to read, as a share of the steps. 0 to 0.5: early steps lay things out and "
                    "are blurred, late ones follow their outline.",
                    end="The last step to read, as a share of the steps. 1 reads to the end.",
                    default_start=0.5,
                ),
                io.Combo.Input(
                    "normalise",
                    options=list(NORMALISE),
                    tooltip="each word by itself (default): from the place where it acts least to where it acts most. "
                    "words against each other: its share among all recorded words, which parts things that touch. as "
                    "measured: the share of attention itself, small numbers.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where the map is above it the mask is white. 0 (default) finds the value that parts each "
                    "map best; by hand 0.25 to 0.5 are useful, higher gives a smaller mask.",
                ),
                io.Int.Input(
                    "clean",
                    default=2,
                    min=0,
                    max=256,
                    tooltip="Takes specks and holes of up to twice as many pixels across out of the mask. 0 leaves "
                    "it as it is; 2 to 8 are useful, more rounds the corners.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.65,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How strongly the map covers the picture in the drawing. 1 shows the map alone.",
                ),
                io.Boolean.Input(
                    "label",
                    default=True,
                    advanced=True,
                    tooltip="Writes each word on its drawing. Turn it off for clean maps.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat_map",
                    tooltip="Every word's map over every picture, picture by picture, dark to bright.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="Black and white: where any of the words acts, one mask a picture. Ready for Keep Outside, "
                    "Cross-Attention Mask or Set Latent Noise Mask.",
                ),
                io.Mask.Output(
                    display_name="soft_map",
                    tooltip="The map before the threshold, 0 to 1, the largest of the words: a soft mask.",
                ),
                io.Float.Output(
                    display_name="leakage",
                    tooltip="Share of the words' attention outside of your mask, 0 to 1, as a mean; -1 without a mask.",
                ),
                io.String.Output(display_name="report", tooltip="What was measured, word by word."),
            ],
            hidden=inputs.unique_id(),
        )

    @classmethod
    def execute(cls, record, samples=None, image=None, mask=None, **chosen) -> io.NodeOutput:
        settings = ReadSettings.of(chosen)
        size = None if image is None else tuple(image.shape[1:3])
        latent = None if samples is None else samples["samples"]
        reading = read(record, settings, latent, size, mask)
        report = reading.describe()
        drawing = drawn(reading, image, settings.opacity, settings.label)
        return io.NodeOutput(drawing, reading.mask, reading.soft, reading.leakage, report, ui=host.told(cls, report))


NODES = [AttentionMap, FindWords, ReadAttentionMap]
