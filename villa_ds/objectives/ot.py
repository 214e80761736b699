"""Word-region alignment by optimal transport (UNITER, section 3.2), solved by IPOT (Xie et al., UAI 2020).

Shape legend: B pairs, T padded text length, R padded region count, H width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from villa_ds.objectives.reductions import widen

NORM_FLOOR = 1e-5  # of a vector in the cosine; the release's


@dataclass(frozen=True, slots=True)
class Transport:
    """Optimal transport between the words and regions of each pair."""

    cost: Tensor  # [B, T, R] cosine distance, 0 at padding
    plan: Tensor  # [B, R, T] without gradient
    distance: Tensor  # [B] trace(cost @ plan); its gradient flows through the cost only


def transport(
    text: Tensor, regions: Tensor, text_valid: Tensor, region_valid: Tensor, beta: float, iterations: int
) -> Transport:
    """Transport between states `text` [B, T, H] and `regions` [B, R, H]; the masks are True at real ones.

    Computed in float32 or wider: the kernel's powers leave half precision's range within a few iterations.
    """
    real = text_valid[:, :, None] & region_valid[:, None, :]
    cost = cosine_distance(widen(text), widen(regions)) * real
    plan = ipot(cost, text_valid, region_valid, beta, iterations)
    return Transport(cost, plan, (cost * plan.transpose(1, 2)).sum((1, 2)))


def cosine_distance(text: Tensor, regions: Tensor) -> Tensor:
    """1 - cosine similarity of every word and region: [B, T, H] and [B, R, H] to [B, T, R]."""
    return 1 - F.normalize(text, dim=-1, eps=NORM_FLOOR) @ F.normalize(regions, dim=-1, eps=NORM_FLOOR).transpose(1, 2)


@torch.no_grad()
def ipot(cost: Tensor, text_valid: Tensor, region_valid: Tensor, beta: float, iterations: int) -> Tensor:
    """Transport plan [B, R, T] between uniform marginals over each pair's real words and regions.

    `iterations` proximal steps of strength `beta`, each with one Sinkhorn scaling of rows and columns. `cost` is
    [B, T, R]. A pair with no real word or no real region has an empty plan.
    """
    # With one side empty the other has nowhere to go: its mass is taken out as if it were padding.
    words = (text_valid & region_valid.any(1, keepdim=True))[:, None, :].to(cost.dtype)  # [B, 1, T]
    regions = (region_valid & text_valid.any(1, keepdim=True))[:, :, None].to(cost.dtype)  # [B, R, 1]
    word_count, region_count = words.sum(2, keepdim=True), regions.sum(1, keepdim=True)  # [B, 1, 1]
    kernel = torch.exp(-cost.transpose(1, 2) / beta) * regions * words
    plan = regions * words
    # Padding has zero mass; 1 in the denominators keeps 0 / 0 out of it.
    word_scale = words / word_count.clamp(min=1)
    for _ in range(iterations):
        proximal = kernel * plan
        mass = (proximal * word_scale).sum(2, keepdim=True)  # [B, R, 1]
        region_scale = 1 / (region_count * mass + (1 - regions))
        mass = (proximal * region_scale).sum(1, keepdim=True)  # [B, 1, T]
        word_scale = 1 / (word_count * mass + (1 - words))
        plan = region_scale * proximal * word_scale
    return plan
