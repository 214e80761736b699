"""The head that lets the two sequences of an image pair attend to each other (UNITER, section 4, "paired-attn").

Shape legend: P pairs, N slots of a sequence, H hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize

PADDING_SCORE = -1e4  # the release's, before the softmax of attention pooling


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another; names and initialisation are torch's, as in the release.

    Each parameter is used by the module that owns it, which torch's own does not do for its output projection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, queried: Tensor, other: Tensor, other_valid: Tensor) -> Tensor:
        """[P, N, H] for each position of `queried` [P, N, H] what it finds in `other`, where `other_valid` [P, N]."""
        width = queried.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query = self._split(F.linear(queried, weight[:width], bias[:width]))
        key, value = (self._split(part) for part in F.linear(other, weight[width:], bias[width:]).chunk(2, dim=-1))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=other_valid[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        output: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        return output

    def _split(self, states: Tensor) -> Tensor:
        rows, length, width = states.shape
        return states.view(rows, length, self.heads, width // self.heads).transpose(1, 2)


class AttentionPooling(nn.Module):
    """A sequence's mean, weighted by a score of each position that is never negative."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, 1), nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, valid: Tensor) -> Tensor:
        """[P, N, H] and [P, N] to [P, H]."""
        scores = self.fc(states).squeeze(-1).masked_fill(~valid, PADDING_SCORE)
        weights = self.dropout(scores.softmax(-1))
        pooled: Tensor = (weights.unsqueeze(1) @ states).squeeze(1)
        return pooled


class PairedAttentionHead(nn.Linear):
    """Both sequences attend to each other, are pooled, and their pair is classified.

    In the reference's state dict the parts in `beside` stand next to the head, not under it.
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        width, sizes = backbone.hidden_size, backbone.sizes
        super().__init__(2 * width, classes)
        heads, dropout = sizes.num_attention_heads, sizes.attention_probs_dropout_prob
        fusion = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(sizes.hidden_dropout_prob))
        self.beside = nn.ModuleDict(
            {
                "attn1": CrossAttention(width, heads, dropout),
                "attn2": CrossAttention(width, heads, dropout),
                "fc": fusion,
                "attn_pool": AttentionPooling(width, dropout),
            }
        )
        initialize(self, backbone.initializer_range)

    def forward(self, states: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]  # two inputs, not Linear's one
        """States of left and right sequences in turn [2 P, N, H], True where real [2 P, N], to logits [P, classes]."""
        left, right = states[0::2], states[1::2]
        left_valid, right_valid = valid[0::2], valid[1::2]
        seen_by_left = self.beside["attn1"](left, right, right_valid)
        seen_by_right = self.beside["attn2"](right, left, left_valid)
        pooled = [
            self.beside["attn_pool"](self.beside["fc"](torch.cat([seen, own], dim=-1)), real)
            for seen, own, real in ((seen_by_left, left, left_valid), (seen_by_right, right, right_valid))
        ]
        return super().forward(torch.cat(pooled, dim=-1))
