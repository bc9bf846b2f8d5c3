"""Train a multimodal encoder on several GPUs: the training of the node, one process a GPU, over accelerate and FSDP.

    pip install accelerate
    torchrun --nproc_per_node 8 tests/recipes/train_multimodal.py --comfyui COMFYUI --checkpoint sdxl.safetensors \\
        --encoder models/palimpsest_encoders/idefics2-8b --dataset output/palimpsest_datasets/dataset_00001 \\
        --out models --name mumu --steps 300000 --batch-size 4 --train-unet --train-language

Every GPU runs the host's own U-Net and the vision-language model on its share of the batch. The connector, its
gradients and its optimiser, which are most of the memory of a training, are sharded block by block by torch's FSDP
(fully_shard). LoRA factors are small: every process has them, and their gradients are averaged. With the same whole
batch the result is that of the node on one GPU. --resume goes on from a file in models/palimpsest_trainings, whatever
the number of processes. accelerate starts the processes and talks between them; its own wrapping of FSDP knows no CPU,
where this is tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent


def load_module(name: str, path: Path, package: bool = False) -> Any:
    """Import a file under a chosen name, as the host imports packs."""
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)] if package else None
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_accelerator(cpu: bool) -> Any:
    """accelerate's state of this process. Exits with a sentence where accelerate is not installed."""
    try:
        import accelerate
    except ImportError:
        sys.exit("training on several GPUs needs the package accelerate: pip install accelerate")
    return accelerate.Accelerator(cpu=cpu)


def accelerated(accelerator: Any, process: type) -> Any:
    """A Process of the training that shares its batch with those of an accelerator."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    class Accelerated(process):
        """One of several processes."""

        def prepare(self, network, optimise):
            mesh = init_device_mesh(accelerator.device.type, (self.world,))
            for part in (*network.blocks, network):
                fully_shard(part, mesh=mesh)
            return network, optimise(network.parameters())

        def backward(self, loss: torch.Tensor) -> None:
            accelerator.backward(loss)

        def average(self, tensors: Sequence[torch.Tensor]) -> None:
            for tensor in tensors:
                tensor.copy_(accelerator.reduce(tensor, "mean"))

        def apply(self, optimiser, norm: torch.Tensor) -> None:
            if math.isfinite(float(self.whole(norm))):
                optimiser.step()

        def whole(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

        def part(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            if not isinstance(like, DTensor):
                return tensor.to(like)
            return distribute_tensor(tensor.to(like.device, like.dtype), like.device_mesh, like.placements)

        def weights(self, network) -> dict[str, torch.Tensor]:
            found = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True))
            return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    return Accelerated(accelerator.process_index, accelerator.num_processes)


def arguments(settings: type, given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every field of the training's settings is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("comfyui", "checkpoint", "encoder", "dataset", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("connector", "resume"):
        parser.add_argument(f"--{name}", type=Path, help="a file to begin with")
    parser.add_argument("--name", default="connector")
    parser.add_argument("--dtype", default="auto", help="of the vision-language model")
    parser.add_argument("--perceiver", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    for field in fields(settings):
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            choices = settings.CHOICES.get(field.name)
            parser.add_argument(option, type=type(field.default), default=field.default, choices=choices)
    return parser.parse_args(given)


def import_host(comfyui: Path, cpu: bool) -> None:
    """Make ComfyUI and the pack importable."""
    if cpu:
        load_module("palimpsest_run_host", TESTS / "run_host.py").declare_missing_operators()
    sys.path.insert(0, str(comfyui))
    kept, sys.argv = sys.argv, sys.argv[:1]
    from comfy.cli_args import args

    sys.argv, args.cpu = kept, cpu
    load_module("palimpsest", TESTS.parent / "__init__.py", package=True)


def main() -> None:
    """Train, and write what the node writes."""
    cpu = "--cpu" in sys.argv
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("--comfyui", type=Path, required=True)
    known, _ = where.parse_known_args()
    accelerator = new_accelerator(cpu)
    import_host(known.comfyui, cpu)

    import comfy.sd
    import folder_paths
    from palimpsest.nodes import plots
    from palimpsest.nodes.multimodal import dataset as interleaved_dataset
    from palimpsest.nodes.multimodal import files as multimodal_files
    from palimpsest.nodes.multimodal.encoder import join
    from palimpsest.nodes.multimodal.training import files
    from palimpsest.nodes.multimodal.training import training as multimodal_training
    from palimpsest.nodes.multimodal.training.learner import Process
    from palimpsest.nodes.multimodal.training.settings import CLIP_TEXT, TrainSettings
    from palimpsest.nodes.multimodal.vlm import load_vlm
    from palimpsest.nodes.training import Watch

    chosen = arguments(TrainSettings)
    folder_paths.models_dir = str(chosen.out)
    folder_paths.folder_names_and_paths["loras"] = ([str(chosen.out / "loras")], {".safetensors"})
    multimodal_files.SHELF.register()
    multimodal_files.ENCODERS.register()
    files.STATES.register()
    settings = TrainSettings(**{field.name: getattr(chosen, field.name) for field in fields(TrainSettings)})
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(chosen.checkpoint),
        output_vae=True,
        output_clip=settings.pooled_output == CLIP_TEXT or settings.course.before_drawing > 0,
    )
    vlm = load_vlm(chosen.encoder, chosen.dtype, chosen.perceiver)
    encoder = join(vlm, multimodal_files.load_connector(str(chosen.connector)) if chosen.connector else None)
    dataset = interleaved_dataset.read_dataset(chosen.dataset)
    state = files.load_state(str(chosen.resume)) if chosen.resume else None
    learns = {"unet": settings.train_unet, "language": settings.train_language}
    kept = files.TrainingFiles.new(chosen.name, True, **learns) if accelerator.is_main_process else None

    def save(snapshot) -> None:
        if kept is not None:
            print("written:", ", ".join(kept.save(snapshot)), flush=True)

    def tell(text: str) -> None:
        if kept is not None:
            print(text, flush=True)

    process = accelerated(accelerator, Process)
    watch = Watch(tell=tell, save=save, **({"begin": kept.require_room} if kept is not None else {}))
    trained = multimodal_training.train(
        model, vae, encoder, dataset, settings, clip=clip, state=state, process=process, watch=watch
    )
    if kept is not None:
        picture = plots.to_image(trained.samples[0])
        picture.save(kept.connector.with_suffix(".jpg"))
        print(multimodal_training.describe(trained), flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
