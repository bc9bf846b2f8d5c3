"""What a model call costs, counted instead of timed: FLOPs, bytes and operations on tensors without storage.

Full-size U-Nets of the host's own classes run on torch's meta device: no weights, no GPU, a second per call on one
core, and the same numbers on every machine. Everything from the guider down to the U-Net is the host's own code, with
the pack's patches where the host calls them. Import it where the host can be imported.

The roof of a call is the time that perfectly efficient unfused kernels without gaps between them would take on a
device: the sum over operations of max(FLOP / rate, bytes / bandwidth).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import tiny_models
import torch
from comfy.ldm.modules.attention import attention_pytorch
from palimpsest.nodes.host import sampling as host_sampling
from palimpsest.nodes.inversion import ddim as inversion
from palimpsest.nodes.kv.nodes import ApplyKV, TuneKV
from palimpsest.nodes.kv.settings import CONDITIONAL
from pocket import settings
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
META = torch.device("meta")

# (FLOP/s of half-precision matrix products with float32 sums, bytes/s): measured, and the data sheet's.
DEVICES = {"H200": (790e12, 4.3e12), "RTX 4090": (165e12, 0.95e12)}

# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What was counted. Costs add, subtract and scale: n iterations are n times one."""

    flops: float = 0.0
    bytes: float = 0.0
    ops: float = 0.0
    h200: float = 0.0  # roofs in seconds
    rtx4090: float = 0.0
    saved: float = 0.0  # bytes that autograd keeps for the backward pass, weights left out
    copied: float = 0.0  # bytes of weights that were copied
    waits: float = 0.0  # numbers read back, at which a GPU's queue runs empty

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, times: float) -> Cost:
        return Cost(*(a * times for a in vars(self).values()))


def operation(flops: float, size: float) -> Cost:
    """One operation of so many FLOPs that moves so many bytes."""
    return Cost(flops, size, 1, *(max(flops / rate, size / bandwidth) for rate, bandwidth in DEVICES.values()))


def memory(tensor: Tensor) -> int:
    """Bytes behind a tensor, each counted once however often an expanded dimension repeats it."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return 0 if 0 in tensor.shape else math.prod(sizes) * tensor.element_size()


# Views and allocations move nothing. Copies leave out what they overwrite.
FREE = {
    aten._unsafe_view,
    aten.set_,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.is_same_size,
}
FREE |= {aten.new_empty_strided, aten.resize_, aten._local_scalar_dense}
OVERWRITE = {aten.copy_, aten.zero_, aten.fill_}
COPY = {aten.clone, aten._to_copy, aten.copy_}


@functools.cache
def composite(func: Any) -> bool:
    """Whether an operation is no more than its parts; in inference mode such arrive whole."""
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta")


@functools.cache
def makes_new_tensors(func: Any) -> bool:
    """Whether an operation gives new tensors, always as many, and writes nothing else."""
    schema = func._schema
    tensors = all(isinstance(each.type, torch.TensorType) for each in schema.returns)
    touched = any(each.alias_info for each in (*schema.returns, *schema.arguments))
    return bool(schema.returns) and tensors and not schema.is_mutable and not touched


class Counter(TorchDispatchMode):
    """Sums the cost of every operation inside it, backward passes too. Attention is one (see OneAttention)."""

    def __init__(self, weights: torch.nn.Module):
        super().__init__()
        self.cost = Cost()
        self.weights = {p.untyped_storage()._cdata for p in weights.parameters()}
        self.saved: dict[int, Any] = {}

    def save(self, tensor: Tensor) -> Tensor:
        """Note what autograd keeps; several tensors on one storage are one."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.saved[storage._cdata] = storage
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is aten.dropout and not args[2]:
            return args[0]  # as its compiled form does; taken apart in Python it would copy
        if composite(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet is aten._local_scalar_dense and args[0].device.type != "cpu":
            self.cost += Cost(waits=1)
        if not func.is_view and packet not in FREE:
            moved = (args[1:] if packet in OVERWRITE else args, kwargs)
            read = [t for t in tree_leaves(moved) if isinstance(t, Tensor)]
            written = [
                t
                for t in tree_leaves(out if packet is not aten._fused_adam_ else (args[0], args[2:4]))
                if isinstance(t, Tensor)
            ]
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
            self.cost += operation(flops, sum(map(memory, read + written)))
            if packet in COPY and read[0].untyped_storage()._cdata in self.weights:
                self.cost += Cost(copied=memory(read[0]))
        return out


@contextlib.contextmanager
def counting(weights: torch.nn.Module) -> Iterator[Counter]:
    """Counts what runs inside; `cost` is complete when it ends."""
    counter = Counter(weights)
    with torch.autograd.graph.saved_tensors_hooks(counter.save, lambda tensor: tensor), counter:
        yield counter
    counter.cost += Cost(saved=sum(storage.nbytes() for storage in counter.saved.values()))


class OneAttention(TorchFunctionMode):
    """Attention on meta tensors as the one fused operation it is on a GPU, not as the products and softmax it means."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        query, key, value, bias, *_ = *args, *[None] * (4 - len(args))
        bias = kwargs.get("attn_mask", bias)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        graded = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, graded)[0]


def layout(given: Any) -> Any:
    """What the outcome's layout can depend on in an operation's arguments, to be looked up."""
    if isinstance(given, Tensor):
        return given.shape, given.stride(), given.dtype, given.is_meta
    if isinstance(given, (list, tuple)):
        return tuple(map(layout, given))
    return type(given), given


class MetaAnswers(TorchDispatchMode):
    """Answers what meta tensors cannot. A number asked of one is `number`; the CPU, to and from it, is meta too.

    A truth is True (all finite, something left to do), but nothing is ever less: no loss falls below its goal.
    """

    laid_out: ClassVar[dict[Any, tuple]] = {}  # PyTorch finds a meta tensor's layout in Python: slow, so once

    def __init__(self) -> None:
        super().__init__()
        self.number = 1.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet is aten._local_scalar_dense and args[0].is_meta:
            truth = getattr(args[0], "truth", True)
            return truth if args[0].dtype is torch.bool else self.number
        if packet is aten._fused_adam_:
            return None
        if packet is aten._to_copy and args[0].is_meta:
            kwargs = kwargs | {"device": META, "pin_memory": False}
        if packet is aten.cat and any(t.is_meta for t in args[0]):
            args = ([t.to(META) for t in args[0]], *args[1:])
        tensors = [t for t in args if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors) and not all(t.is_meta or not t.ndim for t in tensors):
            args = tuple(t.to(META) if isinstance(t, Tensor) and t.ndim else t for t in args)
        out = NotImplemented
        if composite(func):
            with self:
                out = func.decompose(*args, **kwargs)
        if out is NotImplemented:
            out = self.outcome(func, args, kwargs)
        if packet in (aten.lt, aten.le):
            out.truth = False
        elif packet in (aten.all, aten.any):
            out.truth = getattr(args[0], "truth", True)
        return out

    def outcome(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What an operation gives: of new tensors only the layout matters, and it is as it was before."""
        if not makes_new_tensors(func):
            return func(*args, **kwargs)
        asked = func, layout(args), layout(tuple(kwargs.items()))
        if asked not in self.laid_out:
            out = func(*args, **kwargs)
            if all(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(out)):
                self.laid_out[asked] = tuple((t.shape, t.stride(), t.dtype) for t in tree_leaves(out))
            return out
        made = (torch.empty_strided(*sizes, dtype=dtype, device=META) for *sizes, dtype in self.laid_out[asked])
        return next(made) if len(func._schema.returns) == 1 else tuple(made)


# ---- the host on the meta device ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model family of tests/tiny_models.py at a picture size, in pixels."""

    name: str
    kind: str
    pixels: int

    @property
    def layout(self) -> dict:
        """The U-Net's configuration."""
        return tiny_models.FAMILIES[self.kind][2]

    def latent(self) -> Tensor:
        """A LATENT's tensor of one picture, all ones: the host leaves an empty one unscaled."""
        return torch.ones(1, 4, self.pixels // 8, self.pixels // 8)

    def prompt(self, tokens: int = 77) -> list:
        """A CONDITIONING of the family's width."""
        pooled = {"pooled_output": torch.zeros(1, 1280)} if self.layout["adm_in_channels"] else {}
        return [[torch.zeros(1, tokens, self.layout["context_dim"]), pooled]]


FAMILIES = {"SD 1.5": Family("SD 1.5", "sd15-full", 512), "SDXL": Family("SDXL", "sdxl-full", 1024)}
TINY = Family("tiny", "sd15", 64)


class MetaPatcher(comfy.model_patcher.ModelPatcher):
    """The host's ModelPatcher, whose weights stay as they are; there is always room for cond and uncond together."""

    def load(self, *args: Any, **kwargs: Any) -> None:
        """The part of loading that patches see: wrappers around weights. (The host's would fill meta weights.)"""
        for name, module in self.model.named_modules():
            for kind in ("weight", "bias"):
                if hasattr(module, f"{kind}_function"):
                    setattr(module, f"{kind}_function", list(self.weight_wrapper_patches.get(f"{name}.{kind}", ())))

    def get_free_memory(self, device: torch.device) -> float:
        """Bytes."""
        return math.inf


class MetaGuider(comfy.samplers.CFGGuider):
    """The host's guider with a model that need not be moved anywhere, and noise levels that stay readable."""

    def outer_sample(
        self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs
    ) -> Tensor:
        """As the host's, without loading."""
        self.inner_model, device = self.model_patcher.model, self.model_patcher.load_device
        self.model_patcher.patch_model(device)
        self.model_patcher.pre_run()
        try:
            return self.inner_sample(
                noise.to(device), latent_image.to(device), device, sampler, sigmas, *args, **kwargs
            )
        finally:
            self.model_patcher.cleanup()
            self.model_patcher.unpatch_model(device)


def fused(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """optimized_attention_override: PyTorch's attention, as the host chooses on GPUs.

    It brings OneAttention along: blocks that are run again for a gradient (checkpointing) run outside of every mode.
    """
    with OneAttention():
        return attention_pytorch(*args, **kwargs)


def build(family: Family, dtype: torch.dtype = torch.float16, device: torch.device = META) -> Any:
    """A ModelPatcher around a model of the host's classes, with random weights where there is memory for them."""
    with torch.inference_mode():  # as the host's loaders do
        model = tiny_models.network(family.kind, dtype=dtype, device=device)
        if device == META:
            model.model_sampling.to(device)
            patcher = MetaPatcher(model, device, device)
            patcher.model_options["transformer_options"]["optimized_attention_override"] = fused
            return patcher
        tiny_models.fill(model.diffusion_model)
        return comfy.model_patcher.CoreModelPatcher(model, device, comfy.model_management.unet_offload_device())


def fused_step(optimiser: torch.optim.Adam, closure: Any = None) -> None:
    """Adam.step as the one kernel that the pack asks for on CUDA and CPU, and that meta tensors are refused."""
    for group in optimiser.param_groups:
        tensors = [p for p in group["params"] if p.grad is not None]
        for tensor in tensors:
            if not optimiser.state[tensor]:
                optimiser.state[tensor] = {"mean": torch.zeros_like(tensor), "square": torch.zeros_like(tensor)}
        means, squares = ([optimiser.state[t][name] for t in tensors] for name in ("mean", "square"))
        torch._fused_adam_(
            tensors, [t.grad for t in tensors], means, squares, [], [], lr=group["lr"], beta1=0.9, beta2=0.999,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip


@contextlib.contextmanager
def meta_host() -> Iterator[MetaAnswers]:
    """Inside it the host samples on the meta device."""
    guider = mock.patch.object(comfy.samplers, "CFGGuider", MetaGuider)
    adam = mock.patch.object(torch.optim.Adam, "step", fused_step)
    adamw = mock.patch.object(torch.optim.AdamW, "step", fused_step)  # torch hooks it on the class that is made first
    with guider, adam, adamw, MetaAnswers() as answers, OneAttention():
        yield answers


# ---- what is counted ------------------------------------------------------------------------------------------------


class CountCall:
    """A host sampler function: one counted model call, at the first noise level."""

    def __init__(self, weights: torch.nn.Module, answers: MetaAnswers):
        self.weights, self.answers, self.cost = weights, answers, Cost()

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool, **_):
        """Returns x unchanged: the result is in `cost`."""
        sigma = self.answers.number = float(sigmas[0])  # what a patch reads back from the noise levels on the device
        with counting(self.weights) as counter:
            model(x, x.new_full((x.shape[0],), sigma), **extra_args)
        self.cost = counter.cost
        return x


def levels(steps: int) -> tuple[float, ...]:
    """Noise levels that fall to 0; their values cost nothing."""
    return (*(float(steps - i) for i in range(steps)), 0.0)


def sampling_step(model: Any, family: Family, guidance: float) -> Cost:
    """One step of sampling with a model as nodes hand it on. Every step fetches what was tuned for it."""
    with torch.inference_mode(), meta_host() as answers:
        count = CountCall(model.model, answers)
        prompt, start = family.prompt(), family.latent()
        prompts = {"positive": prompt, "negative": prompt, "guidance": guidance}
        host_sampling.sample(model, count, start, sigmas=torch.tensor(levels(1)), **prompts)
    return count.cost


def widgets(node: Any, **chosen: Any) -> dict:
    """A node's widget values for the pocket model, except those chosen."""
    return settings.widgets(node, **chosen)


def without_cache(model: Any) -> Any:
    """The model with an idle patch of another node: the pack then takes no part of a step from its cache."""
    patched = model.clone()
    patched.set_model_input_block_patch(lambda h, options: h)
    return patched


# Sampling steps of a real run, for whole pictures.
STEPS = 50
# Of tunings that are kept as thin factors.
RANK = 32
# How Tune KV runs where nothing else is said: equation 4 of the paper, one row a picture.
TUNING = {"tune_with": CONDITIONAL}
# Settings of Apply KV, by the name under which Calls finds them.
APPLIED = {
    "recompute": {"mode": "recompute", "source_guidance": 1.0},
    "recompute guided": {"mode": "recompute", "source_guidance": 4.0},
    "frozen": {"mode": "frozen", "source_guidance": 1.0},
    "extend": {"mode": "extend", "source_guidance": 1.0},
    "outside": {"mode": "recompute", "source_guidance": 1.0, "end_percent": 0.1},
}


class Calls:
    """Costs of the calls that matter, each counted when it is first asked for: calls["plain"], calls["iteration"], ...

    plain, inversion     a step of the host's own sampling with guidance 7.5; one of inversion
    APPLIED's names      a step with Apply KV
    step, iteration      of Tune KV: a step with one inner iteration, and every further iteration
    step bare, ...       the same, the source's own keys and values not kept
    step uncached, ...   the same, nothing cached
    """

    def __init__(self, model: Any, family: Family):
        self.model, self.family = model, family
        self.costs: dict[str, Cost] = {}
        self.kv: Any = None

    def __getitem__(self, name: str) -> Cost:
        if name not in self.costs:
            self.count(name)
        return self.costs[name]

    def count(self, name: str) -> None:
        """Count a call. Steps and iterations are differences, so that beginning and end of a run cancel."""
        part, _, kind = name.partition(" ")
        if name in ("plain", "inversion"):
            self.costs[name] = sampling_step(self.model, self.family, 7.5 if name == "plain" else 1.0)
        elif name in APPLIED:
            self.costs[name] = sampling_step(self.applied(**APPLIED[name]), self.family, 7.5)
        elif part == "iteration":
            self.costs[name] = self.tuning(kind, 1, 2) - self.tuning(kind, 1, 1)
        elif part == "step":
            self.costs[name] = self.tuning(kind, 2, 1) - self.tuning(kind, 1, 1)
        else:
            raise KeyError(name)

    @functools.cache  # noqa: B019 (one object lives as long as its cache)
    def tuning(self, kind: str, steps: int, iterations: int) -> Cost:
        """A whole run of Tune KV of a kind: "", "bare" or "uncached"."""
        model = without_cache(self.model) if kind == "uncached" else self.model
        chosen = {"keep_source": False} if kind == "bare" else {}
        return self.tune(model, steps, inner_steps=iterations, **chosen)[1]

    def tune(self, model: Any, steps: int, **chosen: Any) -> tuple[Any, Cost]:
        """Tune KV as a node, on a recorded trajectory: (its embeddings, what it cost)."""
        prompt, trajectory = self.family.prompt(), self.trajectory(steps)
        with torch.inference_mode(), meta_host(), counting(model.model) as counter:
            settings = widgets(TuneKV, **TUNING | chosen)
            kv = TuneKV.execute(model, trajectory, prompt, negative=prompt, **settings).args[0]
        return kv, counter.cost

    @functools.cache  # noqa: B019
    def trajectory(self, steps: int) -> Any:
        """What Invert Picture records."""
        start, prompt = self.family.latent(), self.family.prompt()
        with torch.inference_mode(), meta_host():
            return inversion.invert(self.model, start, prompt, levels=levels(steps))

    def applied(self, **chosen: Any) -> Any:
        """The model behind Apply KV. Its embeddings hold the one step that sampling_step passes."""
        if self.kv is None:
            self.kv, _ = self.tune(self.model, 1, inner_steps=1)
        with torch.inference_mode(), meta_host():
            return ApplyKV.execute(self.model, self.kv, **widgets(ApplyKV, **chosen)).args[0]

    def bytes(self, **chosen: Any) -> int:
        """Bytes of a picture's embeddings for a whole run."""
        return self.tune(self.model, 1, inner_steps=1, **chosen)[0].bytes * STEPS
