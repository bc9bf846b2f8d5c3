"""A small graph for every node, in the host's API format, and the same graphs with one bad value in them.

A node gets a good value at every socket, and the least of every number that costs time; NODES says what else it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import values

P = "Palimpsest"
TEXT, EDIT = "a red cat standing in the snow", "a blue cat sitting in the snow"
LINKS = {name: [name, 0] for name in values.THINGS}
MODEL, LATENT, IMAGE, MASK = (LINKS[name] for name in ("sd15", "latent", "image", "mask"))
FLOW = LINKS["flow"]
WALK = {"model": MODEL, "latent": LATENT, "positive": LINKS["positive"], "negative": LINKS["negative"], "steps": 3}
TUNING = {"model": MODEL, "trajectory": ["walk", 0], "positive": LINKS["positive"], "negative": LINKS["negative"]}
BLENDING = TUNING | {"target_positive": LINKS["target"], "mask": MASK, "steps": 1, "layers": "out"}
LESSON = {
    "model": MODEL, "latent": LATENT, "positive": LINKS["positive"], "steps": 1, "validate_every": 0, "batch_size": 1,
    "rescue_filename": "",
}  # fmt: skip
DATASET = {
    "images": IMAGE, "captions": LINKS["caption"], "masks": MASK, "words": "dog", "min_side": 10, "name": "fuzz",
    "detector": "none",
}  # fmt: skip
MADE = {  # what stands before a node: (node, its inputs)
    "walk": ("Invert", WALK),
    "kv": ("TuneKV", TUNING | {"inner_steps": 1, "layers": "middle"}),
    "words": ("SelectWords", {"clip": LINKS["clip"], "text": TEXT, "words": "red cat"}),
    "record": ("FindWords", {"model": MODEL, "trajectory": ["walk", 0], "tokens": ["words", 0],
                             "positive": ["words", 1], "looks": 1}),
    "weights": ("TuneFeatureBlend", BLENDING),
    "adapter": ("TrainContextAdapter", LESSON),
    "encoder": ("LoadMultimodalEncoder", {"folder": "idefics2", "connector": "fuzz.safetensors"}),
    "dataset": ("BuildMultimodalDataset", DATASET),
    "lines": ("TextLines", {"lines": "SIGN", "image": IMAGE}),
    "mgie": ("LoadMGIE", {"folder": "mgie", "dtype": "float32"}),
}  # fmt: skip
GOOD = {  # what a socket of a type is linked to
    "MODEL": MODEL, "CLIP": LINKS["clip"], "VAE": LINKS["vae"], "LATENT": LATENT, "IMAGE": IMAGE, "MASK": MASK,
    "CONDITIONING": LINKS["positive"], "SIGMAS": ["sigmas", 0], "BOUNDING_BOX": LINKS["boxes"],
    "CONTROL_NET": LINKS["text control"], "PALIMPSEST_TEXT_EMBEDDER": LINKS["text embedder"],
    "PALIMPSEST_TRAJECTORY": ["walk", 0], "PALIMPSEST_KV": ["kv", 0], "PALIMPSEST_TOKENS": ["words", 0],
    "PALIMPSEST_ATTENTION_RECORD": ["record", 0], "PALIMPSEST_BLEND_WEIGHTS": ["weights", 0],
    "PALIMPSEST_CONTEXT_ADAPTER": ["adapter", 0], "PALIMPSEST_MULTIMODAL_ENCODER": ["encoder", 0],
    "PALIMPSEST_MULTIMODAL_DATASET": ["dataset", 0], "PALIMPSEST_TEXT_LINES": ["lines", 0],
}  # fmt: skip
NODES: dict[str, dict[str, Any]] = {  # nodes whose graph is not what their sockets say
    "Invert": WALK | {"vae": LINKS["vae"], "steps": 2, "sigmas": ["sigmas", 0], "context_adapter": ["adapter", 0]},
    "FlowEdit": {"source": LINKS["positive"], "source_negative": LINKS["negative"], "mask": MASK},
    "TuneKV": TUNING | {"vae": LINKS["vae"], "inner_steps": 1, "layers": "middle", "mask": MASK},
    "SaveKV": {"kv": ["kv", 0], "filename": "fuzz"},
    "LoadKV": {"file": "kept_00001.safetensors"},
    "FindWords": MADE["record"][1],
    "ReadAttentionMap": {"record": ["record", 0], "image": IMAGE, "mask": MASK},
    "FeatureBlend": {"model": MODEL, "trajectory": ["walk", 0], "positive": LINKS["positive"], "mask": MASK},
    "TuneFeatureBlend": BLENDING,
    "SaveBlendWeights": {"blend_weights": ["weights", 0], "filename": "fuzz"},
    "LoadBlendWeights": {"file": "kept_00001.safetensors"},
    "KeepOutside": {"source": IMAGE, "edited": LINKS["edited"], "mask": MASK},
    "TrainContextAdapter": LESSON,
    "SaveContextAdapter": {"context_adapter": ["adapter", 0], "filename": "fuzz"},
    "LoadContextAdapter": {"file": "kept_00001.safetensors"},
    "ContextSampler": {"context_adapter": ["adapter", 0]},
    "ContextCondition": {"positive": LINKS["positive"], "layout": IMAGE},
    "AttentionFusion": {"model": MODEL, "trajectory": ["walk", 0], "clip": LINKS["clip"], "source_text": TEXT,
                        "edit_text": EDIT, "mask": MASK},
    "LoadMultimodalEncoder": MADE["encoder"][1],
    "MultimodalPrompt": {"model": MODEL, "multimodal_encoder": ["encoder", 0], "images.image1": IMAGE,
                         "masks.mask1": MASK, "text": "a <image1> dog"},
    "BuildMultimodalDataset": DATASET | {"depth": IMAGE},
    "TrainMultimodal": {"model": MODEL, "vae": LINKS["vae"], "multimodal_encoder": ["encoder", 0],
                        "dataset": ["dataset", 0], "steps": 1, "batch_size": 1, "tokens": 16, "preview_every": 0,
                        "save_every": 0, "keep_state": False, "depth": 1, "name": "fuzz", "prompt_dropout": 0.0},
    "LoadMGIE": MADE["mgie"][1],
    "ExpressInstruction": {"image": IMAGE, "mgie": ["mgie", 1], "max_tokens": 8},
    "EditInstruction": {"clip": LINKS["clip"], "expressed": LINKS["caption"]},
    "CaptionHelper": {"images": IMAGE, "captions": "a painting of a cat", "max_tokens": 2},
    "TrainLoRA": {"model": MODEL, "clip": LINKS["clip"], "vae": LINKS["vae"], "images": IMAGE, "captions": "a cat",
                  "masks": MASK, "class_images": IMAGE, "class_caption": "an animal", "epochs": 1, "repeats": 1,
                  "resolution": 64, "rank": 2, "preview_every": 0, "save_every": 0, "keep_state": "none",
                  "filename": "fuzz"},
    "TextLines": MADE["lines"][1],
    "TextPrompt": {"clip": LINKS["clip"], "text": 'a "SIGN"', "text_lines": ["lines", 0],
                   "text_embedder": LINKS["text embedder"]},
    "ReadText": {"image": IMAGE, "wanted": "SIGN"},
    "LoadAnyText": {"file": "fuzz.safetensors"},
    "ApplyTextControl": {"positive": LINKS["target"], "negative": LINKS["negative"],
                         "control_net": LINKS["text control"], "text_lines": ["lines", 0], "vae": LINKS["vae"],
                         "picture": IMAGE},
    "TrainTextControl": {"model": MODEL, "clip": LINKS["clip"], "vae": LINKS["vae"], "folder": "fuzz", "steps": 1,
                         "batch_size": 1, "accumulation": 1, "resolution": 64, "preview_every": 0, "save_every": 0,
                         "keep_state": "none", "filename": "fuzz", "control_net": LINKS["text control"],
                         "text_embedder": LINKS["text embedder"]},
    "TrainInstruction": {"model": MODEL, "clip": LINKS["clip"], "vae": LINKS["vae"], "pictures": IMAGE,
                         "results": IMAGE, "instructions": "make it blue", "masks": MASK, "steps": 1, "rank": 2,
                         "resolution": 64, "preview_every": 0, "save_every": 0, "keep_state": "none",
                         "keep_widened": False, "accumulation": 1, "filename": "fuzz"},
    "EditReport": {"source": IMAGE, "edited": LINKS["edited"], "mask": MASK, "ideal": IMAGE},
}  # fmt: skip
COSTLY = {
    "steps", "inner_steps", "looks", "batch_size", "gradient_accumulation", "depth", "lora_rank", "tokens",
    "inversion_refinements", "context_refinements", "keyframes", "batch_steps", "auto_layers", "size", "warmup",
    "epochs", "repeats", "rank", "resolution", "preview_every", "accumulation", "font", "max_tokens", "averages",
}  # fmt: skip
LONG_PRESETS = {("TrainLoRA", "preset"), ("TrainInstruction", "preset")}  # the papers' numbers of steps
SCHEDULES = {"sigmas": 2, "many sigmas": 900, "flow sigmas": 2}
LONG = {  # what takes minutes unless it is cancelled
    "Invert": {"sigmas": ["many sigmas", 0]},
    "TuneKV": {"inner_steps": 1000, "tolerance": 0.0, "layers": "all"},
    "TuneFeatureBlend": {"steps": 10000},
    "TrainContextAdapter": {"steps": 100000},
    "TrainMultimodal": {"steps": 100000},
    "TrainLoRA": {"epochs": 10000},
    "TrainTextControl": {"steps": 100000},
    "TrainInstruction": {"steps": 100000},
    "KeepOutside": {"source": ["large", 0], "edited": ["large edit", 0], "mask": ["large mask", 0], "grow": 64},
}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TYPE_OF_AUTOGROW = {"images": "IMAGE", "masks": "MASK", "more_masks": "MASK"}
FIRST_OF_AUTOGROW = {"more_masks": "more_masks.mask_0"}


@dataclass(frozen=True)
class Case:
    """A graph with one bad value: whose it is, and the value's name."""

    node: str
    input: str
    name: str
    graph: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.node} {self.input}: {self.name}"


def step(kind: str, /, **inputs: Any) -> dict[str, Any]:
    """A node of a graph."""
    return {"class_type": kind, "inputs": inputs}


class Graphs:
    """Graphs of a host's nodes; info: its object_info, by node id."""

    def __init__(self, info: dict[str, dict]):
        self.info = info
        self.nodes = {kind.removeprefix(P): self.given(kind.removeprefix(P)) for kind in info}

    def given(self, node: str) -> dict[str, Any]:
        """What a node's graph gives it besides its defaults."""
        if node in NODES:
            return NODES[node]
        made = {}
        for name, (kind, options) in self.inputs(P + node).items():
            if kind in GOOD:
                made[name] = LINKS["negative"] if "negative" in name and kind == "CONDITIONING" else GOOD[kind]
            elif kind in ("INT", "FLOAT") and name in COSTLY:
                made[name] = options["min"]
        return made

    def defaults(self, kind: str) -> dict[str, Any]:
        """What an editor sends of a node that nobody touched."""
        made = {}
        for name, (kind_of, options) in self.inputs(kind).items():
            if kind_of in ("INT", "FLOAT", "STRING", "BOOLEAN") and not options.get("forceInput"):
                made[name] = options.get("default", "")
            elif kind_of == "COMBO":
                made[name] = options.get("default", (options.get("options") or [""])[0])
        return made

    def inputs(self, kind: str) -> dict[str, tuple[str, dict]]:
        """(type, options) of a node's inputs by id."""
        found = self.info[kind]["input"]
        both = {**found.get("required", {}), **found.get("optional", {})}
        return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in both.items()}

    def build(self, node: str, changes: dict[str, Any] | None = None, more: dict[str, dict] | None = None) -> dict:
        """A node's graph with some inputs changed and some nodes more, and all that stands before and behind."""
        kind = P + node
        chosen = self.defaults(kind) | self.nodes[node] | (changes or {})
        graph = {"node": step(kind, **chosen), **(more or {})}
        outputs = self.info[kind]["output"]
        for number, given in enumerate(outputs):
            self.look(graph, number, given, chosen, outputs)
        return self.completed(graph)

    def look(self, graph: dict, number: int, given: str, chosen: dict, outputs: list[str]) -> None:
        """Behind an output: what it is for, and a sink."""
        seen, positive, negative = ["node", number], LINKS["target"], LINKS["negative"]
        if given == "MODEL":
            inverted = "trajectory" in chosen or "kv" in chosen
            if "CONDITIONING" in outputs:
                positive = ["node", outputs.index("CONDITIONING")]
                negative = ["node", 2] if outputs.count("CONDITIONING") == 2 else negative
            elif "tokens" in chosen:
                positive = ["words", 1]
            graph[f"sampled{number}"] = step(
                "KSamplerAdvanced", model=seen, positive=positive, negative=negative, cfg=3.0, steps=3, noise_seed=1,
                latent_image=["walk", 1] if inverted else LATENT, add_noise="disable" if inverted else "enable",
                sampler_name="euler", scheduler="normal", start_at_step=0, end_at_step=10000,
                return_with_leftover_noise="disable",
            )  # fmt: skip
            seen = [f"sampled{number}", 0]
        elif given == "SAMPLER":
            flowing = "source" in chosen
            graph[f"sampled{number}"] = step(
                "SamplerCustom", model=FLOW if flowing else MODEL, positive=LINKS["target"], cfg=3.0, add_noise=True,
                negative=LINKS["negative"], noise_seed=0, sampler=seen, latent_image=LATENT,
                sigmas=["flow sigmas" if flowing else "sigmas", 0],
            )  # fmt: skip
            seen = [f"sampled{number}", 0]
        graph[f"sink{number}"] = step("FuzzSink", value=seen)

    def completed(self, graph: dict) -> dict:
        """With every node that is linked to."""
        for name in iter(lambda: next(missing(graph), None), None):
            if name in MADE:
                node, inputs = MADE[name]
                graph[name] = step(P + node, **self.defaults(P + node) | inputs)
            elif name in SCHEDULES:
                steps, model = SCHEDULES[name], FLOW if name.startswith("flow") else MODEL
                graph[name] = step("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)
            else:
                graph[name] = step("FuzzThing", name=name)
        return graph

    def cases(self) -> Iterator[Case]:
        """Every bad value at every input of every node."""
        for node in self.nodes:
            for name, (kind, options) in self.inputs(P + node).items():
                for what, changes, more in self.bad(node, name, kind, options):
                    graph = self.build(node, changes, more)
                    yield Case(node, name, what, wide_prompts(graph) if what == "wide" else graph)

    def bad(self, node: str, name: str, kind: str, options: dict) -> Iterator[tuple[str, dict, dict]]:
        """(name, changed inputs, more nodes) of every bad value of an input."""
        links = {key: key for key in self.nodes[node] if key == name or key.startswith(f"{name}.")}
        kind = TYPE_OF_AUTOGROW.get(name, kind) if kind.startswith("COMFY_AUTOGROW") else kind
        if kind in ("INT", "FLOAT"):
            numbers = values.NUMBERS | (
                {} if options.get("forceInput") else bounds(name, options["min"], options["max"])
            )
            yield from ((what, {name: value}, {}) for what, value in numbers.items())
        elif kind == "COMBO":
            others = options.get("options", [])[1:] if name not in COSTLY and (node, name) not in LONG_PRESETS else []
            yield from ((f"{value!r}", {name: value}, {}) for value in [*others, "no such", "", "../../etc/passwd"])
        elif kind == "STRING" and not options.get("forceInput"):
            yield from ((what, {name: text}, {}) for what, text in values.TEXTS.items())
        elif kind == "BOOLEAN":
            flags = ["maybe", *([] if name in COSTLY else [not options.get("default")])]
            yield from ((repr(value), {name: value}, {}) for value in flags)
        elif kind == "MODEL":
            encoded = {"tokens", "clip"} & self.inputs(P + node).keys()  # by a text encoder that the model must fit
            for family in values.OTHER_MODELS if not encoded else ("wide",):
                yield family, {name: ["bad", 0]}, {"bad": step("FuzzModel", family=family)}
        elif kind in values.BAD:
            link = next(iter(links), FIRST_OF_AUTOGROW.get(name, name))
            good = self.nodes[node].get(link) or GOOD[kind]
            others = {"masks": None} if name == "boxes" else {"boxes": None} if name == "masks" else {}
            for what in values.BAD[kind]:
                bad = step("FuzzBad", value=good, socket=kind, what=what)
                yield what, {link: ["bad", 0], **others}, {"bad": bad}


def bounds(name: str, small: float, large: float) -> dict[str, float]:
    """Values at and beyond the ends of a number's range."""
    ends = {"under": small - 1, "over": large * 2 + 1, "least": small}
    return ends | ({} if name in COSTLY else {"most": large})


def wide_prompts(graph: dict) -> dict:
    """The graph with samplers whose prompts are as wide as the "wide" model reads them."""
    for node in [node for name, node in graph.items() if name.startswith("sampled")]:
        for side in ("positive", "negative"):
            name = f"wide {side}"
            if node["inputs"][side] in LINKS.values():
                graph[name] = step("FuzzBad", value=node["inputs"][side], socket="CONDITIONING", what="another width")
                node["inputs"][side] = [name, 0]
    return graph


def missing(graph: dict) -> Iterator[str]:
    """Nodes that are linked to and not there. Inputs of None are left out."""
    for node in list(graph.values()):
        for name, value in list(node["inputs"].items()):
            if value is None and node["class_type"].startswith(P) and name in ("masks", "boxes"):
                del node["inputs"][name]
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] not in graph:
                yield value[0]
