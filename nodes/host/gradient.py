"""What makes a gradient step through the host's U-Net cheap: no weight copied, no layer run twice, no waiting.

None of it changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import uncompiled
from .model import AttentionLayer, blocks
from .others import guiding_nodes
from .prompts import is_unet


def alias(weight: Tensor) -> Tensor:
    """The same memory as an ordinary tensor: the host loads weights as inference tensors, which autograd may not save.

    Raises TypeError for weights that are not plain tensors (quantised ones).
    """
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(f"cannot alias {type(weight).__name__}")
    empty = torch.empty(0, dtype=weight.dtype, device=weight.device)
    found = empty.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
    if hasattr(weight, "_model_dtype"):  # in which the host's dynamic memory made room for it
        found._model_dtype = weight._model_dtype
    return found


def ordinary(weight: Tensor) -> Tensor:
    """A copy that autograd may save, for weights that cannot be aliased."""
    return (weight.clone() if weight.is_inference() else weight).detach()


class CallNetwork(nn.Module):
    """Carries a network for torch.func.functional_call, which swaps parameters for one call and puts them back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)


@dataclass
class AliasWeights:
    """Wrapper of the network (DIFFUSION_MODEL), or of the model around it (APPLY_MODEL): on aliases of its weights.

    Where a gradient is wanted. Copies none.
    """

    names: list[str]
    aliases: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        network = executor.class_obj
        if not torch.is_grad_enabled():
            return executor(*args, **kwargs)
        if not self.aliases:  # made once the host has loaded the weights; they stay until the run ends
            parameters = dict(network.named_parameters()) | dict(network.named_buffers())
            self.aliases = {f"network.{name}": alias(parameters[name]) for name in self.names}
        return torch.func.functional_call(CallNetwork(network), self.aliases, (executor, *args), kwargs)


AGAIN = "palimpsest_tuning.again"  # in the options of a pass that another node's guidance adds to a model call


@dataclass
class PassesOfACall:
    """PREDICT_NOISE and CALC_COND_BATCH wrappers: tell passes that other nodes' guidance adds from the call's own.

    whole: whether a gradient may go through every layer.
    """

    model: Any
    whole: bool
    passes: int = 0

    def begin(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A model call of the sampler."""
        self.passes = 0
        return executor(*args, **kwargs)

    def count(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, model_options: dict, **kwargs: Any
    ) -> Any:
        """A pass of it. Raises ValueError where one stands on the result of another and not every layer is ready."""
        if self.passes and x.requires_grad and not self.whole:
            raise ValueError(
                "another node on this model runs the network on what it has just drawn, and no gradient goes through "
                f"both: {guiding_nodes(self.model)}. Connect the model from before that node; it may act while the "
                "edit is sampled."
            )
        self.passes += 1
        if self.passes > 1:
            options = model_options.get("transformer_options", {}) | {AGAIN: True}
            model_options = model_options | {"transformer_options": options}
        return executor(model, conds, x, timestep, model_options, **kwargs)


def run_layer(
    layer: nn.Module, x: Tensor, emb: Tensor, context: Any, options: dict, output_shape: Any, *_: Any
) -> Tensor:
    """A layer of a U-Net block as the host runs it."""
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock, Upsample

    if isinstance(layer, SpatialTransformer):
        return layer(x, context, options)
    if isinstance(layer, TimestepBlock):
        return layer(x, emb)
    return layer(x, output_shape=output_shape) if isinstance(layer, Upsample) else layer(x)


@dataclass
class CachedPrefix:
    """forward_timestep_embed patch: layers before the first learned one run once for all iterations of a step.

    Their input does not change until `forget`. Equal to running them, bit for bit. Hosts that call the patch for some
    layers only gain less.
    """

    layers: frozenset[int]
    outputs: dict[tuple, Tensor] = field(default_factory=dict)

    def __call__(self, layer: nn.Module, x: Tensor, emb: Tensor, context: Any, options: dict, *rest: Any) -> Tensor:
        if id(layer) not in self.layers:
            x = run_layer(layer, x, emb, context, options, *rest)
        else:
            name = (id(layer), tuple(options["uuids"]))  # one output per prompt of the batch that came in one call
            if name not in self.outputs or options.get(AGAIN):
                with torch.no_grad():
                    x = run_layer(layer, x, emb, context, options, *rest)
                if not options.get(AGAIN):  # whose patches may differ
                    self.outputs[name] = x
            else:
                x = self.outputs[name]
        if hasattr(layer, "transformer_blocks") and "transformer_index" in options:
            options["transformer_index"] += 1
        return x

    def forget(self) -> None:
        """The input changes: run everything again."""
        self.outputs.clear()


@dataclass
class CachedBlocks:
    """The forwards of a transformer's blocks before the first that learns: run once for all iterations of a step.

    Their input does not change until `forget`. What the last of them gives is kept; the others afterwards give tensors
    of the right shape, hollow, which nobody reads. Equal to running them, bit for bit.
    """

    last: str
    outputs: dict[tuple, Any] = field(default_factory=dict)

    def install(self, patched: Any, names: list[str]) -> None:
        """Stand in the place of some blocks of a MODEL, by their names in its network."""
        for name in names:
            key = f"diffusion_model.{name}.forward"
            patched.add_object_patch(key, partial(self.run, name, patched.get_model_object(key)))

    def run(self, name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """A block's output, run or kept; one per prompt of the batch that came in one call."""
        options = kwargs["transformer_options"]
        key = (name, tuple(options["uuids"]))
        if key in self.outputs and not options.get(AGAIN):
            return each_tensor(self.outputs[key], torch.clone) if name == self.last else self.outputs[key]
        with torch.no_grad():
            found = forward(*args, **kwargs)
        if not options.get(AGAIN):  # whose patches may differ
            self.outputs[key] = each_tensor(found, torch.clone if name == self.last else hollow)
        return found

    def forget(self) -> None:
        """The input changes: run everything again."""
        self.outputs.clear()


def each_tensor(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block gives, a tensor or some, with every one changed."""
    return change(found) if isinstance(found, Tensor) else tuple(change(tensor) for tensor in found)


def hollow(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape that take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


def prefix_layers(network: nn.Module, first: AttentionLayer) -> frozenset[int]:
    """Ids of the layers that a forward pass runs before the transformer which holds `first`; none in video U-Nets."""
    found = set()
    if getattr(network, "default_num_video_frames", None):
        return frozenset()
    for name, number, block in blocks(network):
        for layer in block or ():
            if (name, number) == first.key[:2] and hasattr(layer, "transformer_blocks"):
                return frozenset(found)
            found.add(id(layer))
    return frozenset(found)


def differentiable_attention(previous: Any) -> Callable:
    """An attention override that has a gradient whatever backend the user chose; earlier overrides still act."""

    def attend(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        from comfy.ldm.modules.attention import attention_pytorch

        return previous(attention_pytorch, *args, **kwargs) if previous else attention_pytorch(*args, **kwargs)

    return attend


def prepare(model: Any, first: AttentionLayer, cache: bool) -> tuple[Any, CachedPrefix]:
    """A clone of the model that lets gradients through from layer `first` on, and its cache. The input is untouched.

    cache=False, or patches of other nodes that may look at the layers before `first`, leave the cache without layers.
    """
    from comfy.patcher_extension import WrappersMP

    patched = model.clone()
    uncompiled(patched)
    options = patched.model_options["transformer_options"] = patched.model_options["transformer_options"].copy()
    foreign = any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values())
    network = model.model.diffusion_model
    prefix = CachedPrefix(frozenset() if foreign or not cache else prefix_layers(network, first))
    if prefix.layers:
        patched.set_model_forward_timestep_embed_patch((nn.Module, prefix))
    options["optimized_attention_override"] = differentiable_attention(options.get("optimized_attention_override"))
    names = parameters_in_gradient(model, first)
    plain = [n for n in names if type(model.get_model_object(n)) in (Tensor, nn.Parameter)]
    for name in set(names) - set(plain):
        patched.add_weight_wrapper(name, ordinary)
    around = WrappersMP.DIFFUSION_MODEL if is_unet(model) else WrappersMP.APPLY_MODEL  # not every network has the first
    if is_unet(model):
        plain = [name.removeprefix("diffusion_model.") for name in plain]
    passes = PassesOfACall(model, whole=first.key[:2] == ("input", 0))
    for kind, wrapper in (
        (around, AliasWeights(plain)),
        (WrappersMP.PREDICT_NOISE, passes.begin),
        (WrappersMP.CALC_COND_BATCH, passes.count),
    ):
        patched.add_wrapper_with_key(kind, "palimpsest_tuning", wrapper)
    return patched, prefix


@contextmanager
def host_in_training() -> Iterator[None]:
    """The host's own switch for trainings, on: a transformer rotates its keys by an operation that has a gradient.

    A variable of the host without a setter, which its Train LoRA sets and resets in the same way.
    """
    import comfy.model_management as management

    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


class LateReader:
    """Reads losses without stopping the GPU's queue: one call late there, at once on a CPU."""

    def __init__(self) -> None:
        self.waiting: tuple[Tensor, Any] | None = None

    def read(self, losses: Tensor) -> Tensor | None:
        """The losses of the call before (GPU) or of this call (CPU), on the CPU; None if none have arrived."""
        if losses.device.type != "cuda":
            return losses.detach().cpu()
        arrived, self.waiting = self.waiting, None
        copy = torch.empty(losses.shape, dtype=losses.dtype, pin_memory=True)
        copy.copy_(losses.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.waiting = (copy, event)
        return self.arrived(arrived)

    def rest(self) -> Tensor | None:
        """The losses that are still on their way, waited for; None if there are none."""
        arrived, self.waiting = self.waiting, None
        return self.arrived(arrived)

    def arrived(self, sent: tuple[Tensor, Any] | None) -> Tensor | None:
        """What was sent, once it is there."""
        if sent is None:
            return None
        sent[1].synchronize()
        return sent[0]


def parameters_in_gradient(model: Any, first: AttentionLayer) -> list[str]:
    """Keys, as the host's patcher names them, of the U-Net parameters that a gradient into layer `first` touches.

    They lie at or behind it in a forward pass; in hosts that leave requires_grad on, the others count too. All of
    another network's, with its buffers, which autograd may have to save as well.
    """
    network = model.model.diffusion_model
    if not is_unet(model):
        return [f"diffusion_model.{name}" for name, _ in (*network.named_parameters(), *network.named_buffers())]
    order = {"input_blocks": 0, "middle_block": 1, "output_blocks": 2, "out": 3}
    start = ({"input": 0, "middle": 1, "output": 2}[first.block], first.number)
    keys = []
    for name, module in network.named_modules():
        if not hasattr(module, "weight_function"):
            continue
        parts = name.split(".")
        number = int(parts[1]) if parts[0] in ("input_blocks", "output_blocks") else 0
        behind = (order.get(parts[0], -1), number) >= start
        for key, parameter in module.named_parameters(recurse=False):
            if behind or parameter.requires_grad:
                keys.append(f"diffusion_model.{name}.{key}")
    return keys


class FixedControl:
    """A ControlNet whose output is taken as given: the host loads some with trainable weights, which cannot be here."""

    def __init__(self, control: Any):
        self.control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(self, *args: Any, **kwargs: Any) -> Any:
        """The control's output, without a gradient."""
        with torch.no_grad():
            return self.control.get_control(*args, **kwargs)


def with_fixed_controls(*prompts: list | None) -> list[list | None]:
    """CONDITIONINGs in which every ControlNet is fixed; those that share one still do, so that they run together."""
    fixed: dict[int, FixedControl] = {}

    def fix(extra: dict) -> dict:
        control = extra.get("control")
        return extra if control is None else extra | {"control": fixed.setdefault(id(control), FixedControl(control))}

    return [None if prompt is None else [[tensor, fix(extra)] for tensor, extra in prompt] for prompt in prompts]
