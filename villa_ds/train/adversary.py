"""The adversary: perturbation state, ascent, projection, and the order of passes. It knows no engine.

Sources: VILLA (Gan et al., NeurIPS 2020), Eq. 2 and Algorithm 1, and its released code; FreeLB (Zhu et al., ICLR 2020);
R3F (Aghajanyan et al., ICLR 2021). Notation: K perturbed passes, K-1 updates of the perturbation that matter;
z0 the logits of the clean pass, z those of a perturbed one.

Legend: B rows, T text length, H hidden width, R regions, D feature width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.config import AdversaryConfig, ModalityConfig

TEXT, REGIONS = "text", "regions"
NORM_FLOOR = 1e-8  # the release's floor under the gradient norm

Deltas = Mapping[str, Tensor]  # "text": [B, T, H], "regions": [B, R, D]


class Passes(Protocol):
    """What the adversary asks of whatever runs the model on one micro-batch.

    `mask_draw` names the dropout masks of a pass: equal numbers, equal masks.
    """

    stochastic: bool  # whether dropout is active, so that masks matter
    keeps_clean_graph: bool  # whether the clean graph can be differentiated for its inputs first (not under ZeRO-3)

    @property
    def gradient_scale(self) -> float:
        """What `backward` multiplies every gradient by (micro-batch weight, loss scale)."""

    def forward(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass whose graph is differentiated once for the parameters."""

    def forward_kept(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass whose graph is kept while other passes come and go, then differentiated for the parameters."""

    def probe(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass that is never differentiated for the parameters."""

    def backward(self, scalar: Tensor, *, final: bool, retain_graph: bool = False) -> None:
        """Accumulate the parameter gradient of `scalar`; `final` marks the micro-batch's last one."""


@dataclass(frozen=True)
class PassRecord:
    """One perturbed pass, for metrics and tests; tensors carry no graph."""

    step: int  # ascent step, 0..K-1
    deltas: Deltas  # perturbations used in this pass
    gradients: Deltas  # of the back-propagated scalar; empty after the last ascent step
    loss: Tensor  # [] task loss
    divergence: Tensor  # [] symmetric KL against the clean pass
    logits: Tensor
    nonfinite_rows: Tensor  # [] rows whose gradient was not finite: their perturbation was left as it was


Observer = Callable[[PassRecord], None]
Divergence = Callable[[Tensor, Tensor], Tensor]


def ascend(delta: Tensor, gradient: Tensor, norm: str, step_size: float, max_norm: float) -> Tensor:
    """One ascent step and projection, row by row: delta + step_size * g / ||g||, then ||delta|| <= max_norm.

    `delta` and `gradient` are [B, positions, width]; the norm of a row runs over both other axes. ``linf`` divides by
    the largest entry and clamps entries, as the release does (no sign). A row whose gradient is not finite stays.
    """
    size = row_norm(gradient, norm)
    finite = torch.isfinite(size)
    direction = torch.where(finite, gradient, 0.0) / torch.where(finite, size, 1.0).clamp(min=NORM_FLOOR)
    return project(delta + step_size * direction, norm, max_norm)


def project(delta: Tensor, norm: str, max_norm: float) -> Tensor:
    """Bring every row of [B, positions, width] back to norm <= `max_norm`; 0 means no bound."""
    if max_norm == 0:
        return delta
    if norm == "linf":
        return delta.clamp(-max_norm, max_norm)
    size = row_norm(delta, norm)
    # The floor keeps an all-zero row at zero, where the release gets NaN.
    return delta * torch.where(size > max_norm, max_norm / size.clamp(min=NORM_FLOOR), 1.0)


def row_norm(values: Tensor, norm: str) -> Tensor:
    """Norm of each row of [B, positions, width] as [B, 1, 1]; 0 where there are no positions."""
    flat = values.flatten(1)
    if flat.shape[1] == 0:
        return values.new_zeros(values.shape[0], 1, 1)
    size = flat.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)
    return size[:, None, None]


def initial_delta(config: AdversaryConfig, modality: ModalityConfig, like: Tensor, valid: Tensor, seed: int) -> Tensor:
    """Perturbation [B, positions, width] before the first pass; zero at padding.

    `valid` is [B, positions]. Uniform is U(-eps, eps) / sqrt(N), N the row's real positions times width (Algorithm 1,
    line 4), normal N(0, eps^2 / N); with the linf norm neither is divided. eps is `init_norm`, else `max_norm`.
    """
    if config.init == "zero":
        return torch.zeros_like(like)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    if config.init == "uniform":
        noise = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype) * 2 - 1
    else:
        noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    noise = noise * (modality.init_norm or modality.max_norm) * valid[:, :, None]
    if config.norm == "l2":
        count = valid.sum(1).clamp(min=1) * like.shape[2]
        noise = noise / count.to(like.dtype).sqrt()[:, None, None]
    return project(noise, config.norm, modality.max_norm)


@dataclass(frozen=True)
class _Terms:
    """Weights of the scalar that a micro-batch's gradient belongs to:

    clean * L(0) + scale * sum over K steps and branches of (task * L(delta) + kl * KL(z, z0)).
    """

    clean: float
    scale: float
    task: float
    kl: float
    branches: tuple[tuple[str, ...], ...]  # which modalities each forward of an ascent step perturbs


def _terms(config: AdversaryConfig) -> _Terms:
    modalities = {"text": (TEXT,), "image": (REGIONS,)}.get(config.modality, (TEXT, REGIONS))
    one_at_a_time = config.modality == "alternate" or config.objective == "paper"
    branches = tuple((modality,) for modality in modalities) if one_at_a_time else (modalities,)
    # The release averages over alternating branches; the paper's R_at is their plain sum (Eq. 2).
    share = 1 if config.objective == "paper" else len(branches)
    clean = config.clean_weight if config.clean_weight is not None else float(config.objective == "paper")
    return _Terms(clean, 1.0 / (config.steps * share), config.task_weight, config.kl_weight, branches)


def _values_of(output: LossOutput) -> LossOutput:
    """Without the graph, whose nodes hold their activations where the gradients of inputs had no use for them."""
    loss, logits, elements = (each.detach() for each in (output.loss, output.logits, output.elements))
    return dataclasses.replace(output, loss=loss, logits=logits, elements=elements)


class Adversary:
    """Accumulates the adversarial parameter gradient of one micro-batch after another."""

    def __init__(self, config: AdversaryConfig) -> None:
        self.config = config
        self._terms = _terms(config)

    def accumulate(
        self, passes: Passes, batch: Batch, divergence: Divergence, widths: tuple[int, int], seed: int,
        strength: float = 1.0, observe: Observer | None = None,
    ) -> LossOutput | None:  # fmt: skip
        """Run all passes of one micro-batch; perturbations start anew for each.

        `widths` are (H, D), `seed` keys the initial noise, `strength` scales step sizes and bounds (warm-up).
        Returns the clean pass, if the settings need one.
        """
        work = _MicroBatch(self.config, self._terms, passes, batch, divergence, widths, seed, strength, observe)
        return work.textbook() if self.config.schedule == "textbook" else work.exact()


class _MicroBatch:
    """State of one micro-batch: the perturbations, and what reaches the clean logits through the divergence."""

    def __init__(
        self, config: AdversaryConfig, terms: _Terms, passes: Passes, batch: Batch, divergence: Divergence,
        widths: tuple[int, int], seed: int, strength: float, observe: Observer | None,
    ) -> None:  # fmt: skip
        self.config, self.terms, self.passes, self.divergence = config, terms, passes, divergence
        self.strength, self.observe = strength, observe or (lambda record: None)
        self.settings = {TEXT: config.text, REGIONS: config.image}
        self.shares_masks = config.dropout == "shared" or not passes.stochastic
        self.keeps_clean = config.clean_graph == "keep"
        wide = torch.promote_types(batch.boxes.dtype, torch.float32)
        rows, text_length = batch.input_ids.shape
        shapes = {TEXT: (rows, text_length, widths[0]), REGIONS: (rows, batch.features.shape[1], widths[1])}
        valid = {TEXT: batch.text_valid, REGIONS: batch.region_valid}
        self.deltas: dict[str, Tensor] = {}
        for offset, modality in enumerate(name for branch in terms.branches for name in branch):
            like = torch.empty(shapes[modality], dtype=wide, device=batch.boxes.device)
            noise = initial_delta(config, self.settings[modality], like, valid[modality], seed + offset)
            self.deltas[modality] = noise * strength

    def exact(self) -> LossOutput | None:
        """The same gradient as `textbook` from fewer passes.

        With zero initialisation and shared masks the clean pass *is* ascent step 0 of every branch (the divergence and
        its gradient are zero there), and the clean graph is differentiated for the parameters once, at the end, with
        the cotangent that all divergence terms left on its logits. Where its graph is not kept over the other passes,
        the clean pass is run once more for that.
        """
        if self.config.init == "zero" and self.shares_masks:
            return self._clean_pass_is_step_zero()
        return self._separate_clean_pass()

    def textbook(self) -> LossOutput | None:
        """Algorithm as published: every step a pass of its own, the clean graph differentiated again in each."""
        joint, terms = self.config.clean == "joint", self.terms
        with torch.set_grad_enabled(joint or terms.clean > 0):
            clean = self.passes.forward_kept(None, 0)
        anchor = clean.logits if joint else clean.logits.detach()
        for step in range(self.config.steps):
            results = [self._forward(branch, step, index) for index, branch in enumerate(terms.branches)]
            kls = [self._kl(output, anchor) for output, _ in results]
            pairs = list(zip(results, kls, strict=True))
            scalar = torch.stack([self._scalar(output, kl) for (output, _), kl in pairs]).sum()
            final = step == self.config.steps - 1
            if final and terms.clean:
                scalar = scalar + terms.clean * clean.loss
            self.passes.backward(scalar, final=final, retain_graph=not final)
            for (output, leaves), kl in pairs:
                self._ascend(step, output, kl, leaves)
        return clean

    def _clean_pass_is_step_zero(self) -> LossOutput:
        config, terms = self.config, self.terms
        step_weight = terms.scale * terms.task  # of L in one branch of one ascent step
        clean_weight = terms.clean + step_weight * len(terms.branches)
        joint = config.clean == "joint" and terms.kl > 0 and config.steps > 1
        keeps = self.keeps_clean and self.passes.keeps_clean_graph
        leaves = self._leaves(tuple(self.deltas), config.steps > 1)
        perturbation = Perturbation(leaves.get(TEXT), leaves.get(REGIONS))
        if not joint:
            clean = self.passes.forward(perturbation, 0)
            self.passes.backward(clean_weight * clean.loss, final=config.steps == 1)
            # Ascent takes the branch's own gradient, not that of the weighted clean loss.
            factor = step_weight / (clean_weight * self.passes.gradient_scale) if clean_weight else 0.0
            gradients = {name: leaf.grad * factor for name, leaf in leaves.items() if leaf.grad is not None}
        else:
            run = self.passes.forward_kept if keeps else self.passes.probe
            clean = run(perturbation, 0)
            gradients = self._input_gradients(step_weight * clean.loss, leaves, retain_graph=keeps)
            if not keeps:
                clean = _values_of(clean)
        zero = clean.loss.new_zeros(())
        for branch in terms.branches:
            self._update(0, clean, zero, {name: leaves[name] for name in branch}, gradients)
        if not joint:
            self._perturbed_passes(1, clean.logits.detach(), final=True)
        else:
            anchor = clean.logits.detach().requires_grad_()
            self._perturbed_passes(1, anchor, final=False)
            self._backward_clean(clean if keeps else self.passes.forward(None, 0), clean_weight, anchor)
        return clean

    def _separate_clean_pass(self) -> LossOutput | None:
        terms = self.terms
        if terms.kl == 0 and terms.clean == 0:  # FreeLB: nothing to compare with, nothing to add
            self._perturbed_passes(0, None, final=True)
            return None
        if self.config.clean == "joint" and terms.kl > 0:
            if self.keeps_clean:
                clean = self.passes.forward_kept(None, 0)
            else:
                with torch.no_grad():
                    clean = self.passes.probe(None, 0)
            anchor = clean.logits.detach().requires_grad_()
            self._perturbed_passes(0, anchor, final=False)
            self._backward_clean(clean if self.keeps_clean else self.passes.forward(None, 0), terms.clean, anchor)
            return clean
        if terms.clean:
            clean = self.passes.forward(None, 0)
            self.passes.backward(terms.clean * clean.loss, final=False)
        else:
            with torch.no_grad():
                clean = self.passes.probe(None, 0)
        self._perturbed_passes(0, clean.logits.detach(), final=True)
        return clean

    def _perturbed_passes(self, first: int, anchor: Tensor | None, *, final: bool) -> None:
        """Ascent steps `first`..K-1, one backward a pass; `final`: the last of them ends the micro-batch."""
        last = (self.config.steps - 1, len(self.terms.branches) - 1)
        for step in range(first, self.config.steps):
            for index, branch in enumerate(self.terms.branches):
                output, leaves = self._forward(branch, step, index)
                kl = self._kl(output, anchor)
                self.passes.backward(self._scalar(output, kl), final=final and (step, index) == last)
                self._ascend(step, output, kl, leaves)

    def _backward_clean(self, clean: LossOutput, weight: float, anchor: Tensor) -> None:
        cotangent = torch.zeros_like(anchor) if anchor.grad is None else anchor.grad / self.passes.gradient_scale
        self.passes.backward(weight * clean.loss + (clean.logits * cotangent).sum(), final=True)

    def _forward(self, branch: tuple[str, ...], step: int, index: int) -> tuple[LossOutput, dict[str, Tensor]]:
        leaves = self._leaves(branch, step < self.config.steps - 1)
        mask_draw = 0 if self.shares_masks else 1 + step * len(self.terms.branches) + index
        return self.passes.forward(Perturbation(leaves.get(TEXT), leaves.get(REGIONS)), mask_draw), leaves

    def _kl(self, output: LossOutput, anchor: Tensor | None) -> Tensor:
        if anchor is None:
            return output.loss.new_zeros(())
        with torch.set_grad_enabled(self.terms.kl > 0):  # of weight 0 it is only logged
            return self.divergence(output.logits, anchor)

    def _scalar(self, output: LossOutput, kl: Tensor) -> Tensor:
        return self.terms.scale * (self.terms.task * output.loss + self.terms.kl * kl)

    def _leaves(self, names: tuple[str, ...], wants_gradient: bool) -> dict[str, Tensor]:
        return {name: self.deltas[name].detach().clone().requires_grad_(wants_gradient) for name in names}

    def _input_gradients(self, scalar: Tensor, leaves: dict[str, Tensor], *, retain_graph: bool) -> dict[str, Tensor]:
        # Scaled like a backward, or the gradients of many classes underflow in float16.
        scale = self.passes.gradient_scale
        gradients = torch.autograd.grad(scale * scalar, list(leaves.values()), retain_graph=retain_graph)
        return {name: gradient / scale for name, gradient in zip(leaves, gradients, strict=True)}

    def _ascend(self, step: int, output: LossOutput, kl: Tensor, leaves: dict[str, Tensor]) -> None:
        scale = self.passes.gradient_scale
        gradients = {name: leaf.grad / scale for name, leaf in leaves.items() if leaf.grad is not None}
        self._update(step, output, kl.detach(), leaves, gradients)

    def _update(self, step: int, output: LossOutput, kl: Tensor, leaves: Deltas, gradients: Deltas) -> None:
        nonfinite = output.loss.new_zeros((), dtype=torch.int64)
        gradients = {name: gradients[name] for name in leaves if name in gradients}
        for name, gradient in gradients.items():
            modality = self.settings[name]
            nonfinite = nonfinite + (~torch.isfinite(row_norm(gradient, self.config.norm))).sum()
            self.deltas[name] = ascend(
                leaves[name].detach(), gradient, self.config.norm,
                modality.step_size * self.strength, modality.max_norm * self.strength,
            )  # fmt: skip
        used = {name: leaf.detach() for name, leaf in leaves.items()}
        self.observe(PassRecord(step, used, gradients, output.loss.detach(), kl, output.logits.detach(), nonfinite))
