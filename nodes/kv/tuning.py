"""KV Inversion, stage 2, inside the host: fitting keys and values along a trajectory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import low_rank
from ...kernels.ddim import ddim_step
from ...kernels.kv_inversion import content_preserving, reconstruction_loss
from .. import host
from ..host import gradient as tuning_runtime
from .embeddings import KVEmbeddings, TunedLayer, pack
from .psi import BetweenKeyframes, OneOfSeveral, Psi

PLACEMENTS = {
    "decoder": ("output",),
    "encoder": ("input",),
    "middle": ("middle",),
    "all": ("input", "middle", "output"),
}

# lambda and gamma weigh whole layers: at the embeddings' rate they swing by tenths an iteration.
SCALAR_RATE = 0.1

# The source carries the identity and needs more: on the pocket model rank 4 with 16 keeps what rank 4 with 4 loses.
SOURCE_RANK = 4

Report = Callable[[int, int, float], None]


def placed(layers: list, placement: str) -> list:
    """The layers of a placement: decoder = output blocks, encoder = input blocks, middle, all (paper, section 4.2)."""
    return [layer for layer in layers if layer.block in PLACEMENTS[placement]]


@dataclass(frozen=True)
class TuneSettings:
    """How psi_t is fitted at every step; see PalimpsestTuneKV for what each does to the picture."""

    start: float = 0.0
    inner_steps: int = 10
    learning_rate: float = 0.1
    tolerance: float = 1e-5
    warm_start: bool = True
    keep_source: bool = True
    end: float = 1.0
    weights_only: bool = False
    rank: int = 0
    keyframes: int = 1
    batch_steps: int = 1

    @property
    def source_rank(self) -> int:
        """Rank of the source's tokens: they carry the identity, which needs more than the corrections K_hat, V_hat."""
        return SOURCE_RANK * self.rank

    @property
    def folded(self) -> bool:
        """Whether gamma is stored multiplied into K_hat, V_hat: keyframes mix the two apart."""
        return self.keyframes == 1 and not self.weights_only

    def span(self, steps: int) -> tuple[int, int]:
        """The steps first <= t < last in which psi_t is learned and acts. Raises ValueError if there are none."""
        first, last = round(self.start * steps), round(self.end * steps)
        if first >= last:
            raise ValueError(
                f"start {self.start:g} and end {self.end:g} leave none of {steps} steps to learn: move them apart, or "
                "invert in more steps."
            )
        return first, last

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: falls to one half, as null-text inversion's 1 - i/100 does over its 50 steps."""
        return self.learning_rate * (1.0 - 0.5 * step / steps)

    def converged(self, step: int) -> float:
        """Loss below which a step stops early: null-text inversion's 1e-5 + 2e-5 i, i = 0 at the noisiest step."""
        return self.tolerance * (1.0 + 2.0 * step)

    def groups(self, first: int, last: int) -> Iterator[range]:
        """Steps that are learned together: each by itself, `batch_steps` at a time, or up to the next keyframe."""
        if self.keyframes > 1:
            yield range(first, first + 1)
            first += 1
        size = max(self.keyframes, self.batch_steps if self.keyframes == 1 else 1)
        for start in range(first, last, size):
            yield range(start, min(start + size, last))


# Polishing by one or two iterations a step mends what learning from the stored latents alone leaves (drift).
POLISH = 2


@dataclass
class TuningState:
    """What the attention replacements and the tuning loop share during one run. psi None: the network as it is.

    Of the last pass through the network as it is, for the prompt's rows R: inputs (R, N, C) of to_k and to_v, and
    sources, the keys and values (R, N, C).
    """

    psi: Psi | BetweenKeyframes | OneOfSeveral | None = None
    grids: dict[tuple, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[tuple, Tensor] = field(default_factory=dict)
    sources: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)
    mask: Tensor | None = None

    def tokens(self, height: int, width: int, rows: int) -> Tensor | None:
        """The mask's weight of every token, (rows, N, 1); None without a mask."""
        if self.mask is None:
            return None
        small = host.picture_rows(self.mask, self.mask.shape[0], height, width).flatten(1)[..., None]
        return small.repeat(rows // small.shape[0], 1, 1)


@dataclass(frozen=True)
class RecordInputs:
    """attn1 patch, behind those of other nodes: keep what the layers' to_k and to_v are fed for the source."""

    keys: frozenset[tuple]
    state: TuningState

    def __call__(self, query: Tensor, context: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        name = host.layer_key(options)
        if self.state.psi is None and name in self.keys and 0 in options["cond_or_uncond"]:
            if value is not None and value is not context and not torch.equal(value, context):
                raise ValueError(
                    "another node feeds self-attention different tokens for keys and for values (a hypernetwork?): "
                    "take it out for the tuning."
                )
            chunks, _ = host.chunk_rows(options, context.shape[0])
            self.state.inputs[name] = context.detach().chunk(chunks)[options["cond_or_uncond"].index(0)]
        return query, context, value


@dataclass(frozen=True)
class TunedAttention:
    """attn1 replacement while tuning: K_bar, V_bar from the parameters being fitted (eq. 1), in every row."""

    keys: frozenset[tuple]
    state: TuningState
    previous: Any = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict, **_) -> Tensor:
        psi, name = self.state.psi, host.layer_key(options)
        if name not in self.keys:
            return host.run_attention(options, self.previous, query, key, value)
        grid = self.state.grids[name] = tuple(options["activations_shape"][-2:])
        chunks, rows = host.chunk_rows(options, query.shape[0])
        if psi is None and 0 in options["cond_or_uncond"]:
            chunk = options["cond_or_uncond"].index(0)
            self.state.sources[name] = tuple(t.detach().chunk(chunks)[chunk] for t in (key, value))
        if psi is not None:
            embeddings, mask = psi.embeddings(name), self.state.tokens(*grid, rows)
            if mask is not None:
                embeddings = tuple(t * mask.to(t) for t in embeddings)
            # One row serves every prompt by broadcasting; several rows repeat for each.
            k_hat, v_hat, weights = (t.to(key.dtype) for t in (*embeddings, psi.weights(name)))
            if rows > 1 and chunks > 1:
                k_hat, v_hat, weights = (t.repeat(chunks, *(1,) * (t.ndim - 1)) for t in (k_hat, v_hat, weights))
            lambda_k, gamma_k, lambda_v, gamma_v = weights.unbind(1)
            key = content_preserving(key, k_hat, lambda_k, gamma_k)
            value = content_preserving(value, v_hat, lambda_v, gamma_v)
        return host.run_attention(options, self.previous, query, key, value)


@dataclass(frozen=True)
class Rows:
    """Latents to be carried one step down, each with its target: x, target (R, C, H, W); levels (R,) each.

    goal (R,), the loss that ends the learning, stays on the CPU.
    """

    x: Tensor
    target: Tensor
    sigma: Tensor
    sigma_next: Tensor
    goal: Tensor
    step: int

    def column(self, levels: Tensor) -> Tensor:
        """Levels (R,) as (R, 1, 1, 1) in x's dtype."""
        return levels.to(self.x.dtype)[:, None, None, None]

    @property
    def signal(self) -> Tensor:
        """sqrt(abar) of the level arrived at, (R, 1, 1, 1)."""
        return self.column(torch.rsqrt(1.0 + self.sigma_next**2))


class FitTrajectory:
    """A host sampler function: stage 2 of KV Inversion. Fits psi_t at every step, then walks on with what it fitted."""

    def __init__(
        self,
        trajectory: host.Trajectory,
        state: TuningState,
        prefix: tuning_runtime.CachedPrefix,
        layers: list[host.AttentionLayer],
        settings: TuneSettings,
        report: Report,
    ):
        self.trajectory, self.state, self.prefix, self.settings = trajectory, state, prefix, settings
        self.report = report
        self.channels = {layer.key: layer.channels for layer in layers}
        self.tuned: list[TunedLayer] = []
        self.span = settings.span(trajectory.steps)
        self.learned: list[Tensor | None] = [None] * trajectory.steps
        self.source: list[Tensor | None] = [None] * trajectory.steps
        self.scalars: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.iterations = 0
        self.predict: Callable[[Tensor, Tensor], Tensor] | None = None
        self.current: Rows | None = None

    def __call__(
        self, model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Any, disable: bool = False, **_
    ) -> Tensor:
        """x (B, C, H, W) at sigmas[0], the trajectory's noisiest latent. Returns the reconstruction."""
        self.predict = functools.partial(model, **(extra_args or {}))
        first, last = self.span
        outside = [range(i, i + 1) for i in (*range(first), *range(last, self.trajectory.steps))]
        psi = None
        for group in sorted([*outside, *self.settings.groups(first, last)], key=lambda steps: steps.start):
            several = self.fit_group(group, psi, x.device) if len(group) > 1 else None
            for place, step in enumerate(group):
                rows = self.rows(range(step, step + 1), x)
                if not first <= step < last:
                    x, denoised = self.walk(rows)
                else:
                    x, denoised, psi = self.learn(rows, psi, several, place)
                if callback is not None:
                    sigma = self.trajectory.sigmas[step]
                    callback({"i": step, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised.detach()})
        self.predict = self.current = None
        return x

    def learn(
        self, rows: Rows, psi: Psi | None, several: Psi | BetweenKeyframes | None, place: int
    ) -> tuple[Tensor, Tensor, Psi]:
        """One step of the span: (next latent, denoised, parameters to go on with); keeps what was learned.

        several: what fit_group learned for the group of steps, in which this is number `place`.
        """
        if not self.tuned or self.settings.keep_source or self.settings.weights_only:
            self.walk(rows)
            self.note_layers()
        if isinstance(several, BetweenKeyframes):
            x, denoised = self.walk(rows, OneOfSeveral(several, place))
            if place + 1 < several.steps:
                return x, denoised, psi
            psi = several.after
        elif several is not None:
            pictures = self.trajectory.pictures
            psi = several.map(lambda t: t[place * pictures : (place + 1) * pictures].clone())
            x, denoised = self.fit(psi, rows, min(POLISH, self.settings.inner_steps))
        else:
            psi = self.begin(psi, 1)
            x, denoised = self.fit(psi, rows, self.settings.inner_steps)
        self.keep(rows.step, psi)
        return x, denoised, psi

    def advance(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(next latent, denoised) of one DDIM step (eq. 4)."""
        if rows is not self.current:
            self.prefix.forget()
            self.current = rows
        denoised = self.predict(rows.x, rows.sigma)
        return ddim_step(rows.x, denoised, rows.column(rows.sigma), rows.column(rows.sigma_next)), denoised

    def rows(self, steps: range, x: Tensor) -> Rows:
        """One step from the latent x, or several steps at once from their latents (step-major)."""
        t, pictures, device = self.trajectory, self.trajectory.pictures, x.device

        def rowed(values: list[float]) -> Tensor:
            return torch.tensor(values).repeat_interleave(pictures)

        return Rows(
            x=x,
            target=t.latents[steps.start + 1 : steps.stop + 1].flatten(0, 1).to(device),
            sigma=rowed([t.sigmas[i] for i in steps]).to(device),
            sigma_next=rowed([t.sigmas[i + 1] for i in steps]).to(device),
            goal=rowed([self.settings.converged(i) for i in steps]),
            step=steps.start,
        )

    def walk(self, rows: Rows, psi: Any = None) -> tuple[Tensor, Tensor]:
        """(next latent, denoised) with parameters as they are; None: with the network as it is."""
        self.state.psi = psi
        with torch.no_grad():
            return self.advance(rows)

    def note_layers(self) -> None:
        """Learn the token grids from the pass that just ran."""
        if not self.state.grids:
            raise RuntimeError(
                "no self-attention layer of the placement ran: the model's blocks are replaced by another node."
            )
        self.tuned = self.tuned or [
            TunedLayer(*key, *self.state.grids[key], channels)
            for key, channels in self.channels.items()
            if key in self.state.grids
        ]

    def begin(self, psi: Psi | None, times: int) -> Psi:
        """Parameters for the next step, or for `times` steps: what the last one learned (warm start), or fresh ones."""
        warm = psi is not None and self.settings.warm_start
        device = next(iter(self.state.sources.values()))[0].device
        if self.settings.weights_only:
            fresh = Psi(self.tuned, times * self.trajectory.pictures, device, source=dict(self.state.sources))
            if warm:
                fresh.scalars = psi.repeated(times).scalars
            return fresh
        if warm:
            return psi.repeated(times)
        return Psi(self.tuned, times * self.trajectory.pictures, device, self.settings.rank)

    def fit_group(self, group: range, psi: Psi | None, device: torch.device) -> Psi | BetweenKeyframes:
        """Learn several steps at once, each from the trajectory's own latent (teacher forcing)."""
        latents = self.trajectory.latents[group.start : group.stop].to(device)
        rows = self.rows(group, latents.flatten(0, 1))
        self.walk(rows)
        self.note_layers()
        if self.settings.keyframes == 1:
            found = self.begin(psi, len(group))
        else:
            self.walk(self.rows(group[-1:], latents[-1]))  # the new keyframe's own source
            found = BetweenKeyframes(psi, self.begin(psi, 1), len(group))
        self.fit(found, rows, self.settings.inner_steps)
        return found

    def fit(self, psi: Psi | BetweenKeyframes, rows: Rows, iterations: int) -> tuple[Tensor, Tensor]:
        """Minimise eq. 3 over psi from the latents of `rows`; leaves each row's best psi, returns its z_{t-1}."""
        import comfy.model_management

        self.state.psi = psi
        embeddings, weights = psi.learnable()
        rate = self.settings.rate(rows.step, self.trajectory.steps)
        groups = [{"params": embeddings, "lr": rate}] if embeddings else []
        groups.append({"params": weights, "lr": rate * SCALAR_RATE})
        for tensor in psi.tensors():
            tensor.requires_grad_(True)
        optimiser = torch.optim.Adam(groups, fused=rows.x.device.type in ("cpu", "cuda"))
        mask = self.loss_mask(rows.x)
        reader, best, goal = tuning_runtime.LateReader(), None, psi.per_row(rows.goal)
        goal_there = goal.to(rows.x.device)
        for iteration in range(iterations + 1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            last = iteration == iterations
            with torch.set_grad_enabled(not last):
                x_next, denoised = self.advance(rows)
                losses = reconstruction_loss(x_next, rows.target, rows.signal, mask)
            with torch.no_grad():
                best = better(best, psi, x_next, psi.per_row(losses))
            arrived = reader.read(best.losses)
            if arrived is not None:
                if not bool(torch.isfinite(arrived).all()):
                    raise ValueError(
                        f"the model returns NaN at step {rows.step + 1} of the tuning: run it in another precision "
                        "(start ComfyUI with --bf16-unet or --fp32-unet), or look at the prompt and the picture."
                    )
                self.report(rows.step, iteration, float(arrived.mean()))
            if last or (arrived is not None and bool((arrived <= goal).all())):
                break
            optimiser.zero_grad(set_to_none=True)
            # The sum over elements, not the mean: half-precision gradients stay clear of underflow, and Adam is
            # scale-free.
            unfinished = psi.per_row(losses) * (best.losses > goal_there)
            unfinished.sum().mul(rows.x[0].numel()).backward()
            optimiser.step()
            self.iterations += 1
        with torch.no_grad():
            for tensor, value in zip(psi.tensors(), best.tensors, strict=True):
                tensor.requires_grad_(False).copy_(value)
        self.losses.append(best.losses.mean())
        return best.x, denoised.detach()

    def loss_mask(self, x: Tensor) -> Tensor | None:
        """The mask on the latent grid, (R, 1, h, w); None without a mask."""
        if self.state.mask is None:
            return None
        small = host.picture_rows(self.state.mask, self.trajectory.pictures, *x.shape[-2:]).to(x)
        return small.repeat(len(x) // len(small), 1, 1, 1)

    def keep(self, step: int, psi: Psi) -> None:
        """Store a finished step on the CPU."""
        weights = torch.stack([psi.weights(layer.key).detach()[..., 0, 0] for layer in self.tuned])
        if not psi.fixed:
            gammas = weights[:, :, 1::2, None, None].clone()
            if self.settings.folded:
                weights[:, :, 1::2] = 1.0
            else:
                gammas[:] = 1.0
            self.learned[step] = pack(
                [self.acting(layer, factors, gamma[:, i]) for i, factors in enumerate(psi.factors[layer.key])]
                for layer, gamma in zip(self.tuned, gammas, strict=True)
            )
        if self.settings.keep_source or self.settings.weights_only:
            rank = self.settings.source_rank
            inputs = {layer: self.state.inputs[layer.key] for layer in self.tuned}
            self.source[step] = pack(
                [low_rank.factorise(tokens, rank) if layer.factored(rank) else (tokens,)]
                for layer, tokens in inputs.items()
            )
        self.scalars[step] = weights.transpose(1, 2).cpu()

    def acting(self, layer: TunedLayer, factors: tuple[Tensor, ...], gamma: Tensor) -> tuple[Tensor, ...]:
        """K_hat or V_hat as it acts: with gamma, and with the mask's weights on its tokens."""
        first = factors[0].detach() * gamma
        mask = self.state.tokens(layer.height, layer.width, len(first))
        return (first if mask is None else first * mask.to(first)), *factors[1:]


@dataclass
class Best:
    """Per row, the parameters, latent and loss of the best iteration yet."""

    tensors: list[Tensor]
    x: Tensor
    losses: Tensor


def better(best: Best | None, psi: Psi | BetweenKeyframes, x: Tensor, losses: Tensor) -> Best:
    """The better of two iterations, row by row. NaN never wins, but begins."""
    if best is None:
        return Best([t.detach().clone() for t in psi.tensors()], x.detach(), losses.detach())
    won = losses < best.losses
    for kept, new in zip(best.tensors, psi.tensors(), strict=True):
        torch.where(won.view(-1, *(1,) * (new.ndim - 1)), new.detach(), kept, out=kept)
    if len(x) == len(won):
        best.x = torch.where(won.view(-1, 1, 1, 1), x.detach(), best.x)
    best.losses = torch.where(won, losses.detach(), best.losses)
    return best


def tune(
    model: Any,
    trajectory: host.Trajectory,
    positive: list,
    negative: list | None,
    guidance: float,
    placement: str,
    settings: TuneSettings,
    report: Report,
    callback: Any = None,
    mask: Tensor | None = None,
) -> tuple[KVEmbeddings, Tensor]:
    """Fit KV embeddings to every picture of a trajectory (Algorithm 1, stage 2), all at once and each on its own.

    mask (MASK of any size): learn and rebuild its white part only. Returns the embeddings and the reconstruction as on
    a LATENT socket. The model is left as it was. Raises ValueError for another architecture than the trajectory's and
    for models spread over several GPUs.
    """
    layers = placed(host.self_attention_layers(model, "KV Inversion"), placement)
    if trajectory.layout != host.layout_fingerprint(model):
        raise ValueError(
            "the trajectory was recorded with another model architecture: invert the picture with this model."
        )
    if not layers:
        raise ValueError(f"this model has no self-attention in placement {placement!r}: choose another placement.")
    model = host.single_device(model)
    state = TuningState()
    if mask is not None:
        state.mask = host.picture_rows(mask, trajectory.pictures, *mask.shape[-2:])[:, 0].clone()
        if not bool((state.mask.flatten(1).amax(1) > 0).all()):
            raise ValueError(
                "the mask of Tune KV is black all over: nothing would be learned. Paint the subject white."
            )
    prompts = [extra for _, extra in (*positive, *(negative or ()))]
    if any("area" in extra or extra.get("set_area_to_bounds") for extra in prompts):
        raise ValueError(
            "the prompt of a tuning describes the whole picture, this one is limited to an area: connect it without "
            "ConditioningSetArea, and masks with set_cond_area default (Apply KV takes such prompts)."
        )
    with torch.inference_mode(False):
        # A ControlNet adds to the prefix's outputs in place, so that they cannot be kept.
        controlled = any("control" in extra for extra in prompts)
        patched, prefix = tuning_runtime.prepare(model, layers[0], not controlled)
        keys = frozenset(layer.key for layer in layers)
        host.replace_attention(patched, "attn1", layers, lambda previous: TunedAttention(keys, state, previous))
        patched.set_model_attn1_patch(RecordInputs(keys, state))
        if controlled:
            # The host adds a ControlNet to the skips in place, after the next block has saved them for its gradient.
            patched.set_model_input_block_patch_after_skip(lambda h, _: h.clone())
            positive, negative = host.with_fixed_controls(positive, negative)
        fitting = FitTrajectory(trajectory, state, prefix, layers, settings, report)
        start = model.model.process_latent_out(trajectory.latents[0].clone())
        levels = torch.tensor(trajectory.sigmas)
        rebuilt = host.sample(
            patched,
            fitting,
            start,
            sigmas=levels,
            positive=positive,
            negative=negative,
            guidance=guidance,
            callback=callback,
        ).cpu()
    untouched = torch.ones(len(fitting.tuned), 4, trajectory.pictures)
    kv = KVEmbeddings(
        sigmas=trajectory.sigmas,
        layers=tuple(fitting.tuned),
        span=fitting.span,
        learned=tuple(fitting.learned),
        source=tuple(fitting.source),
        scalars=torch.stack([fitting.scalars.get(i, untouched) for i in range(trajectory.steps)]),
        noise=start,
        layout=trajectory.layout,
        rank=settings.rank,
        source_rank=settings.source_rank,
        folded=settings.folded,
        info={"iterations": fitting.iterations, "losses": [float(loss) for loss in fitting.losses]},
    )
    return kv, rebuilt
