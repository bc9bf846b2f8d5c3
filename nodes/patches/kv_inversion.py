"""KV Inversion inside the host: tuning keys and values along a trajectory, and attending to them while sampling."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference.ddim import ddim_step, signal_level
from ...kernels.reference.kv_inversion import content_preserving, reconstruction_loss, source_guidance
from . import host, inversion
from .artefacts import KVEmbeddings, LayerEmbeddings, Trajectory, TunedLayer

PLACEMENTS = {
    "decoder": ("output",),
    "encoder": ("input",),
    "middle": ("middle",),
    "all": ("input", "middle", "output"),
}

# lambda and gamma weigh whole layers: at the embeddings' rate they swing by tenths an iteration.
SCALAR_RATE = 0.1


def placed(layers: list, placement: str) -> list:
    """The layers of a placement: decoder = output blocks, encoder = input blocks, middle, all (paper, section 4.2)."""
    return [layer for layer in layers if layer.block in PLACEMENTS[placement]]


# ---- tuning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneSettings:
    """How psi_t is fitted at every step; see PalimpsestTuneKV for what each does to the picture."""

    start: float
    inner_steps: int
    learning_rate: float
    tolerance: float
    tolerance_growth: float
    warm_start: bool
    keep_source: bool

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: falls to one half, as null-text inversion's 1 - i/100 does over its 50 steps."""
        return self.learning_rate * (1.0 - 0.5 * step / steps)

    def converged(self, step: int) -> float:
        """Loss below which a step stops early: null-text inversion's 1e-5 + 2e-5 i, i = 0 at the noisiest step."""
        return self.tolerance + self.tolerance_growth * step


class Psi:
    """The learnable parameters of one step, and the source's own keys and values at it (empty when not kept)."""

    def __init__(self, layers: list[TunedLayer], pictures: int, device: torch.device):
        self.layers = layers
        self.embeddings = {
            layer.key: torch.zeros(2, pictures, layer.height * layer.width, layer.channels, device=device)
            for layer in layers
        }
        self.scalars = {layer.key: torch.ones(4, pictures, 1, 1, device=device) for layer in layers}
        self.sources: dict[tuple, Tensor] = {}

    def continued(self) -> Psi:
        """A copy to start the next step from (warm start)."""
        other = Psi.__new__(Psi)
        other.layers, other.sources = self.layers, {}
        other.embeddings = {k: v.detach().clone() for k, v in self.embeddings.items()}
        other.scalars = {k: v.detach().clone() for k, v in self.scalars.items()}
        return other

    def tensors(self) -> list[Tensor]:
        """All learnable tensors of this step, each with the pictures in dimension 1."""
        return [*self.embeddings.values(), *self.scalars.values()]

    def snapshot(self) -> list[Tensor]:
        """A copy of tensors()."""
        return [t.detach().clone() for t in self.tensors()]

    def blob(self) -> Tensor:
        """Everything of this step in one (B, P) float16 piece on the CPU, in the order KVEmbeddings.step reads."""
        parts = []
        for layer in self.layers:
            parts.append(self.embeddings[layer.key])
            if layer.key in self.sources:
                parts.append(self.sources[layer.key])
        return torch.cat([p.detach().movedim(1, 0).flatten(1) for p in parts], 1).to("cpu", torch.float16)


@dataclass
class TuningState:
    """What the attention replacements and the tuning loop share during one run."""

    psi: Psi | None = None
    grids: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    sources: dict[tuple, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TunedAttention:
    """attn1 replacement while tuning: K_bar, V_bar from the parameters being fitted (eq. 1), in every row."""

    layer: host.SelfAttention
    state: TuningState
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_) -> Tensor:
        psi, name = self.state.psi, self.layer.key
        self.state.grids[name] = tuple(options["activations_shape"][-2:])
        chunks, _ = host.chunk_rows(options, query.shape[0])
        if psi is None and 0 in options["cond_or_uncond"]:
            chunk = options["cond_or_uncond"].index(0)
            self.state.sources[name] = torch.stack([t.detach().chunk(chunks)[chunk] for t in (key, value)])
        if psi is not None:
            k_hat, v_hat = psi.embeddings[name].to(key.dtype).repeat(1, chunks, 1, 1)
            lambda_k, gamma_k, lambda_v, gamma_v = psi.scalars[name].to(key.dtype).repeat(1, chunks, 1, 1)
            key = content_preserving(key, k_hat, lambda_k, gamma_k)
            value = content_preserving(value, v_hat, lambda_v, gamma_v)
        return host.run_attention(options, self.previous, query, key, value)


def differentiable_attention(previous: Any) -> Callable:
    """An attention override that has a gradient whatever backend the user chose; earlier overrides still act."""

    def attend(function: Callable, *args: Any, **kwargs: Any) -> Tensor:
        from comfy.ldm.modules.attention import attention_pytorch

        return previous(attention_pytorch, *args, **kwargs) if previous else attention_pytorch(*args, **kwargs)

    return attend


def trainable(weight: Tensor) -> Tensor:
    """A weight that autograd may save but not train: the host loads weights as inference tensors, which it may not."""
    return (weight.clone() if weight.is_inference() else weight).detach()


def prepare_for_tuning(model: Any, layers: list[host.SelfAttention], state: TuningState) -> Any:
    """A clone of the model whose attention reads `state` and lets gradients through. The input is left as it was."""
    patched = model.clone()
    for layer in layers:
        previous = host.earlier_replacement(model, "attn1", layer)
        patched.set_model_attn1_replace(TunedAttention(layer, state, previous), *layer.key)
    for name in host.parameters_in_gradient(model, layers[0]):
        patched.add_weight_wrapper(name, trainable)
    options = patched.model_options["transformer_options"] = patched.model_options["transformer_options"].copy()
    options["optimized_attention_override"] = differentiable_attention(options.get("optimized_attention_override"))
    return patched


class FitTrajectory:
    """A host sampler function: stage 2 of KV Inversion. Fits psi_t at every step, then walks on with what it fitted."""

    def __init__(
        self,
        trajectory: Trajectory,
        state: TuningState,
        layers: list[host.SelfAttention],
        settings: TuneSettings,
        report: Callable[[int, int, float], None],
    ):
        self.trajectory, self.state, self.settings, self.report = trajectory, state, settings, report
        self.keys = {layer.key: layer for layer in layers}
        self.blobs: list[Tensor | None] = []
        self.scalars: dict[int, Tensor] = {}
        self.losses: list[float] = []
        self.iterations = 0
        self.tuned: list[TunedLayer] = []

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ):
        """x (B, C, H, W) at sigmas[0], the trajectory's noisiest latent. Returns the reconstruction."""
        steps = len(sigmas) - 1
        first = round(self.settings.start * steps)
        psi = None
        for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):

            def advance(latent: Tensor, sigma: float = sigma, sigma_next: float = sigma_next) -> tuple[Tensor, Tensor]:
                denoised = model(latent, latent.new_full((latent.shape[0],), sigma), **(extra_args or {}))
                return ddim_step(latent, denoised, sigma, sigma_next), denoised

            self.state.psi = None
            if i < first or not self.tuned or self.settings.keep_source:
                with torch.no_grad():
                    plain, denoised = advance(x)
            if i < first:
                x = plain
                self.keep(None)
            else:
                psi = psi.continued() if psi is not None and self.settings.warm_start else self.fresh(x)
                if self.settings.keep_source:
                    psi.sources = {layer.key: self.state.sources[layer.key] for layer in self.tuned}
                target = self.trajectory.latents[i + 1].to(x.device)
                x, denoised = self.fit(psi, advance, x, target, i, signal_level(sigma_next))
                self.keep(psi)
            if callback is not None:
                callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        self.state.psi = None
        return x

    def fresh(self, x: Tensor) -> Psi:
        """lambda = gamma = 1, K_hat = V_hat = 0: eq. 1 changes nothing yet, and the gradient reaches K_hat at once."""
        if not self.tuned:
            if not self.state.grids:
                raise RuntimeError(
                    "no self-attention layer of the placement ran: the model's blocks are replaced by another node."
                )
            self.tuned = [
                TunedLayer(*key, *self.state.grids[key], layer.channels)
                for key, layer in self.keys.items()
                if key in self.state.grids
            ]
        return Psi(self.tuned, x.shape[0], x.device)

    def fit(
        self, psi: Psi, advance: Callable, x: Tensor, target: Tensor, step: int, signal: float
    ) -> tuple[Tensor, Tensor]:
        """Minimise eq. 3 over psi_t from the latent x; leaves each picture's best psi and returns its z_{t-1}."""
        import comfy.model_management

        self.state.psi = psi
        rate = self.settings.rate(step, self.trajectory.steps)
        optimiser = torch.optim.Adam(
            [
                {"params": [t.requires_grad_(True) for t in psi.embeddings.values()], "lr": rate},
                {"params": [t.requires_grad_(True) for t in psi.scalars.values()], "lr": rate * SCALAR_RATE},
            ]
        )
        goal, elements = self.settings.converged(step), x[0].numel()
        best = best_x = best_loss = denoised = None
        for iteration in range(self.settings.inner_steps + 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            last = iteration == self.settings.inner_steps
            with torch.set_grad_enabled(not last):
                x_next, denoised = advance(x)
                losses = reconstruction_loss(x_next, target, signal)
            if iteration == 0 and not bool(torch.isfinite(losses).all()):
                raise ValueError(
                    f"the model returns NaN at step {step + 1} of the tuning: run it in another precision "
                    "(start ComfyUI with --bf16-unet or --fp32-unet), or look at the prompt and the picture."
                )
            best, best_x, best_loss = better(best, best_x, best_loss, psi, x_next.detach(), losses.detach())
            self.report(step, iteration, float(best_loss.mean()))
            open_pictures = best_loss > goal
            if last or not bool(open_pictures.any()):
                break
            optimiser.zero_grad(set_to_none=True)
            # The sum over elements, not the mean: half-precision gradients stay clear of underflow, and Adam is
            # scale-free.
            (losses * open_pictures).sum().mul(elements).backward()
            optimiser.step()
            self.iterations += 1
        with torch.no_grad():
            for tensor, value in zip(psi.tensors(), best, strict=True):
                tensor.copy_(value)
        self.losses.append(float(best_loss.mean()))
        return best_x, denoised.detach()

    def keep(self, psi: Psi | None) -> None:
        """Store a finished step on the CPU."""
        self.blobs.append(None if psi is None else psi.blob())
        if psi is not None:
            self.scalars[len(self.blobs) - 1] = torch.stack([s.detach()[..., 0, 0] for s in psi.scalars.values()]).cpu()


def better(
    best: list[Tensor] | None, best_x: Tensor, best_loss: Tensor, psi: Psi, x: Tensor, losses: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Per picture, the parameters and latent with the lower loss. Tensors of psi hold the pictures in dimension 1."""
    if best is None:
        return psi.snapshot(), x, losses
    won = losses < best_loss
    for kept, new in zip(best, psi.tensors(), strict=True):
        kept.copy_(torch.where(won.view(1, -1, 1, 1), new.detach(), kept))
    return best, torch.where(won.view(-1, 1, 1, 1), x, best_x), torch.where(won, losses, best_loss)


def tune(
    model: Any,
    trajectory: Trajectory,
    positive: list,
    negative: list | None,
    guidance: float,
    placement: str,
    settings: TuneSettings,
    report: Callable[[int, int, float], None],
    callback: Any = None,
) -> tuple[KVEmbeddings, Tensor]:
    """Fit KV embeddings to every picture of a trajectory (Algorithm 1, stage 2), all at once and each on its own.

    Returns the embeddings and the reconstruction as on a LATENT socket. The model is left as it was. Raises ValueError
    for another architecture than the trajectory's and for models spread over several GPUs.
    """
    layers = placed(host.self_attention_layers(model, "KV Inversion"), placement)
    if trajectory.layout != host.layout_fingerprint(model):
        raise ValueError(
            "the trajectory was recorded with another model architecture: invert the picture with this model."
        )
    if not layers:
        raise ValueError(f"this model has no self-attention in placement {placement!r}: choose another placement.")
    if round(settings.start * trajectory.steps) >= trajectory.steps:
        raise ValueError(
            f"start {settings.start:g} leaves none of {trajectory.steps} steps to learn: lower it, or invert in more "
            "steps."
        )
    model = host.single_device(model)
    state = TuningState()
    fitting = FitTrajectory(trajectory, state, layers, settings, report)
    with torch.inference_mode(False):
        patched = prepare_for_tuning(model, layers, state)
        start = model.model.process_latent_out(trajectory.latents[0].clone())
        levels = torch.tensor(trajectory.sigmas)
        rebuilt = inversion.sample(patched, fitting, start, levels, positive, negative, guidance, callback).cpu()
    untouched = torch.ones(len(fitting.tuned), 4, trajectory.pictures)
    kv = KVEmbeddings(
        sigmas=trajectory.sigmas,
        layers=tuple(fitting.tuned),
        steps=tuple(fitting.blobs),
        scalars=torch.stack([fitting.scalars.get(i, untouched) for i in range(trajectory.steps)]),
        latent=tuple(trajectory.latents.shape[2:]),
        keeps_source=settings.keep_source,
        layout=trajectory.layout,
        info={"iterations": fitting.iterations, "losses": fitting.losses},
    )
    return kv, rebuilt


# ---- sampling -------------------------------------------------------------------------------------------------------


def recompute(key: Tensor, value: Tensor, learned: LayerEmbeddings) -> tuple[Tensor, Tensor]:
    """K_bar, V_bar from the edited picture's own K, V and the learned embeddings (eq. 1; Algorithm 1, stage 3)."""
    return (
        content_preserving(key, learned.k_hat, learned.lambda_k, learned.gamma_k),
        content_preserving(value, learned.v_hat, learned.lambda_v, learned.gamma_v),
    )


def frozen(key: Tensor, value: Tensor, learned: LayerEmbeddings) -> tuple[Tensor, Tensor]:
    """K_bar, V_bar as they were when the source was rebuilt ("use the learned K_bar, V_bar of the tuning stage")."""
    k_bar, v_bar = recompute(learned.k_source, learned.v_source, learned)
    return k_bar.expand_as(key), v_bar.expand_as(value)


def extend(key: Tensor, value: Tensor, learned: LayerEmbeddings) -> tuple[Tensor, Tensor]:
    """The edit's own K, V and behind them the source's, (R, 2N, C): every query may look at both pictures.

    The source's K, V are what the untouched network computes on the exact path, without K_hat, V_hat: those mend the
    source's own errors token by token, and mean nothing at another pose.
    """
    return (
        torch.cat([key, learned.k_source.expand(len(key), -1, -1)], 1),
        torch.cat([value, learned.v_source.expand(len(value), -1, -1)], 1),
    )


MODES = {"extend": extend, "recompute": recompute, "frozen": frozen}
NEEDS_SOURCE = ("frozen", "extend")


def weaken(
    key: Tensor, value: Tensor, k_bar: Tensor, v_bar: Tensor, strength: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Use K_bar, V_bar in part: (keys, values, attention bias).

    Same length: K and V move the share `strength` of the way to K_bar and V_bar. Longer: the added tokens weigh
    `strength` times as much as they would, by a bias of log(strength) on their scores.
    """
    if strength == 1.0:
        return k_bar, v_bar, None
    if k_bar.shape == key.shape:
        return torch.lerp(key, k_bar, strength), torch.lerp(value, v_bar, strength), None
    bias = key.new_zeros(key.shape[1], k_bar.shape[1])
    bias[:, key.shape[1] :] = math.log(strength)
    return k_bar, v_bar, bias


@dataclass(frozen=True)
class CurrentStep:
    """What SelectStep leaves in the options of one model call for the layers to read."""

    layers: dict[tuple, LayerEmbeddings]


class RunCache:
    """The step last fetched in one sampling run; the host drops it with the run's options."""

    def __init__(self) -> None:
        self.step: tuple | None = None
        self.value: CurrentStep | None = None


@dataclass(frozen=True)
class StartRun:
    """OUTER_SAMPLE wrapper: a fresh cache for every sampling run, gone when the run ends."""

    name: str

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        options[self.name + ".run"] = RunCache()
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(self.name + ".run", None)


@dataclass(frozen=True)
class SelectStep:
    """APPLY_MODEL wrapper: once per model call, fetch the embeddings tuned nearest to the current noise level."""

    name: str
    kv: KVEmbeddings
    sigma_start: float
    sigma_end: float
    look_ahead: float

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = dict(transformer_options or {})
        sigma = float(t.flatten()[0])
        if self.active(sigma) and not options.get(self.name + ".hidden"):
            self.check(x, options)
            options[self.name] = self.fetch(sigma, executor.class_obj, x.device, options.get(self.name + ".run"))
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def active(self, sigma: float) -> bool:
        """Whether the embeddings act at this noise level."""
        return self.sigma_end < sigma <= self.sigma_start

    def check(self, x: Tensor, options: dict) -> None:
        """Refuse a batch or picture size that the embeddings were not tuned to."""
        _, pictures = host.chunk_rows(options, x.shape[0])
        if self.kv.pictures not in (1, pictures):
            raise ValueError(
                f"these KV embeddings were tuned to {self.kv.pictures} pictures, the sampled batch has {pictures}: "
                "sample "
                f"{self.kv.pictures} at a time, or tune to a single picture to use it for any batch."
            )
        if tuple(x.shape[-2:]) != self.kv.latent[1:]:
            raise ValueError(
                f"these KV embeddings were tuned to a latent of {self.kv.latent[2]} x {self.kv.latent[1]}, sampling "
                "runs at "
                f"{x.shape[-1]} x {x.shape[-2]} (8 pixels each): resize the picture to the tuned size, or tune again. "
                "Prompts limited to an area sample a crop; limit them by a mask instead."
            )

    def fetch(self, sigma: float, base_model: Any, device: torch.device, cache: RunCache | None) -> CurrentStep | None:
        """The step's embeddings in the model's compute dtype, reused while the step stays the same."""
        dtype = getattr(base_model, "get_dtype_inference", base_model.get_dtype)()
        wanted = (self.kv.at(sigma), device, dtype)
        if cache is not None and cache.step == wanted:
            return cache.value
        layers = self.kv.step(*wanted)
        later = self.kv.ahead(wanted[0], self.look_ahead)
        if layers is not None and later != wanted[0]:
            source = self.kv.step(later, device, dtype)
            layers = {
                k: replace(v, k_source=source[k].k_source, v_source=source[k].v_source) for k, v in layers.items()
            }
        value = None if layers is None else CurrentStep(layers)
        if cache is not None:
            cache.step, cache.value = wanted, value
        return value


@dataclass(frozen=True)
class SourceGuidance:
    """Post-CFG function: one more model row a step, with the source hidden, and a push away from what it draws."""

    select: SelectStep
    scale: float

    def __call__(self, args: dict) -> Tensor:
        import comfy.samplers

        guided, sigma = args["denoised"], args["sigma"]
        if not self.select.active(float(sigma.flatten()[0])):
            return guided
        without_text = args.get("uncond_denoised") is not None and args.get("uncond") is not None
        prompt = args["uncond"] if without_text else args["cond"]  # guidance 1 runs without the negative prompt
        shown = args["uncond_denoised"] if without_text else args["cond_denoised"]
        model_options = args["model_options"].copy()
        hidden_source = {self.select.name + ".hidden": True}
        model_options["transformer_options"] = model_options.get("transformer_options", {}) | hidden_source
        (hidden,) = comfy.samplers.calc_cond_batch(args["model"], [prompt], args["input"], sigma, model_options)
        return source_guidance(guided, shown, hidden, self.scale)


@dataclass(frozen=True)
class ContentPreservingAttention:
    """attn1 replacement while sampling: attend to K_bar, V_bar in cond and uncond rows alike (eq. 2).

    strength is the share of the source in them (see `weaken`); a mask (pictures, h, w) blends the outputs,
    m Attn(Q, K_bar, V_bar) + (1 - m) Attn(Q, K, V).
    """

    name: str
    layer: TunedLayer
    mode: Callable[[Tensor, Tensor, LayerEmbeddings], tuple[Tensor, Tensor]]
    strength: float
    mask: Tensor | None
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_) -> Tensor:
        step = options.get(self.name)
        learned = step.layers.get(self.layer.key) if step is not None else None
        if learned is None:
            return host.run_attention(options, self.previous, query, key, value)
        chunks, pictures = host.chunk_rows(options, query.shape[0])
        k_bar, v_bar = self.mode(key, value, for_rows(learned, chunks, pictures))
        k_bar, v_bar, bias = weaken(key, value, k_bar, v_bar, self.strength)
        edited = host.run_attention(options, self.previous, query, k_bar, v_bar, bias)
        if self.mask is None:
            return edited
        plain = host.run_attention(options, self.previous, query, key, value)
        height, width = options["activations_shape"][-2:]
        weight = (
            host.picture_rows(self.mask.to(edited), pictures, height, width).flatten(1)[..., None].repeat(chunks, 1, 1)
        )
        return torch.lerp(plain, edited, weight.to(edited))


def for_rows(learned: LayerEmbeddings, chunks: int, pictures: int) -> LayerEmbeddings:
    """Embeddings of one picture broadcast over all rows; those of B pictures repeat for every chunk of B rows."""
    if learned.k_hat.shape[0] == 1 or chunks == 1:
        return learned
    repeated = {n: t.repeat(chunks, 1, 1) for n, t in vars(learned).items() if t is not None}
    return LayerEmbeddings(**repeated)


def apply(
    model: Any,
    kv: KVEmbeddings,
    mode: str,
    strength: float,
    start_percent: float,
    end_percent: float,
    placement: str,
    mask: Tensor | None,
    look_ahead: float = 0.0,
    guidance: float = 1.0,
) -> Any:
    """A clone of the model that attends to the tuned keys and values. At strength 0 it is the model, bit for bit.

    Raises ValueError if the model's layers are not those the embeddings were tuned in.
    """
    from comfy.patcher_extension import WrappersMP

    present = {layer.key: layer for layer in host.self_attention_layers(model, "KV Inversion")}
    for layer in kv.layers:
        if layer.key not in present or present[layer.key].channels != layer.channels:
            raise ValueError(
                f"these KV embeddings were tuned on another architecture: they hold {layer.channels} channels for "
                "layer "
                f"{layer.block} {layer.number}.{layer.index}, which this model "
                + (f"has with {present[layer.key].channels}." if layer.key in present else "does not have.")
                + " Load the checkpoint family they were tuned on (SD 1.5 or SDXL), or tune again."
            )
    if mode in NEEDS_SOURCE and not kv.keeps_source:
        raise ValueError(f"mode {mode!r} needs the source's own keys and values: tune again with keep_source on.")
    patched = model.clone()
    if strength == 0.0:
        return patched
    sampling = model.get_model_object("model_sampling")
    name = f"palimpsest_kv.{uuid.uuid4().hex}"
    for layer in placed(list(kv.layers), placement):
        attend = ContentPreservingAttention(
            name, layer, MODES[mode], strength, mask, host.earlier_replacement(model, "attn1", present[layer.key])
        )
        patched.set_model_attn1_replace(attend, *layer.key)
    window = (sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, name, StartRun(name))
    select = SelectStep(name, kv, *window, look_ahead)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, name, select)
    if guidance != 1.0:
        patched.set_model_sampler_post_cfg_function(SourceGuidance(select, guidance))
    return patched
