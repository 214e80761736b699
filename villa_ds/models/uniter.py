"""UNITER (Chen et al., ECCV 2020): one transformer over text and regions in a single sequence.

Shape legend: B rows, T padded text length, R padded region count, J joint length, Q queried positions, H hidden width,
D feature width.

The joint sequence of a row is compact: its real tokens, then its real regions, then padding, so that J is the longest
row's length and not T + R.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from villa_ds.batch import Batch, Embeddings, Encoded, Reads
from villa_ds.errors import ConfigError
from villa_ds.models.backbone import Backbone, register
from villa_ds.models.layers import Encoder, WideLinear, initialize, make_layer_norm, take
from villa_ds.models.presets import BackboneSizes

BOX_WIDTH = 7  # x1 y1 x2 y2 w h area


@dataclass(frozen=True, slots=True)
class JointLayout:
    """What sits where in the joint sequence."""

    slots: Tensor  # [B, J] int64: the slot that a joint position holds; the position's own number at padding
    valid: Tensor  # [B, J] bool, True at real positions


def joint_layout(batch: Batch) -> JointLayout:
    """The compact layout of a batch, computed on its device without asking the host."""
    positions = torch.arange(batch.joint_length, device=batch.text_lengths.device)
    lengths, totals = batch.text_lengths[:, None], (batch.text_lengths + batch.region_counts)[:, None]
    valid = positions < totals
    in_regions = valid & (positions >= lengths)
    return JointLayout(torch.where(in_regions, batch.input_ids.shape[1] + positions - lengths, positions), valid)


def joint_positions(batch: Batch, slots: Tensor) -> Tensor:
    """Where the slots [B, Q] of a batch sit in the joint sequence: [B, Q]; of padded slots, some valid index."""
    padded = batch.input_ids.shape[1]
    positions = torch.where(slots < padded, slots, slots - padded + batch.text_lengths[:, None])
    return positions.clamp(max=batch.joint_length - 1)


class TextEmbeddings(nn.Module):
    """Word, position and type embeddings; only the words lie before the seam."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        # Row 0 is [PAD]: the lookup gives it no gradient, the tied MLM decoder does.
        self.word_embeddings = nn.Embedding(sizes.vocabulary_size, sizes.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(sizes.max_position_embeddings, sizes.hidden_size)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, sizes.hidden_size)
        self.LayerNorm = make_layer_norm(sizes.hidden_size, sizes.fused_layer_norm)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, words: Tensor, types: Tensor) -> Tensor:
        """Word embeddings [B, T, H] and type embeddings [B, T, H] to embeddings [B, T, H], in the type of `words`."""
        positions = self.position_embeddings(torch.arange(words.shape[1], device=words.device))
        embedded: Tensor = self.dropout(self.LayerNorm(words + positions + types))
        return embedded


class RegionEmbeddings(nn.Module):
    """Projections of region features and boxes, each with its own LayerNorm."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        width, fused = sizes.hidden_size, sizes.fused_layer_norm
        self.img_linear = WideLinear(sizes.feature_width, width, sizes.onednn)
        self.img_layer_norm = make_layer_norm(width, fused)
        self.pos_layer_norm = make_layer_norm(width, fused)
        self.pos_linear = WideLinear(BOX_WIDTH, width, sizes.onednn)
        # The reference's table has a row for "not masked", which it zeroes at every use; row 0 is never read here.
        self.mask_embedding = nn.Embedding(2, sizes.feature_width)
        self.LayerNorm = make_layer_norm(width, fused)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def mask(self, features: Tensor, region_mask: Tensor) -> Tensor:
        """Add the mask embedding to the features [B, R, D] of masked regions ([B, R] bool)."""
        row: Tensor = self.mask_embedding(torch.ones((), dtype=torch.int64, device=features.device))
        return features + region_mask.unsqueeze(-1) * row.to(features.dtype)

    def forward(self, features: Tensor, boxes: Tensor, types: Tensor) -> Tensor:
        """[B, R, D], [B, R, 7] and type embeddings [B, R, H] to [B, R, H], in the type of `features`."""
        projected = self.img_layer_norm(self.img_linear(features)) + self.pos_layer_norm(self.pos_linear(boxes))
        embedded: Tensor = self.dropout(self.LayerNorm(projected + types))
        return embedded


class Pooler(nn.Module):
    """The state of joint position 0 ([CLS]; region 0 without text), projected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, state: Tensor) -> Tensor:
        """[B, H] to [B, H]."""
        return torch.tanh(self.dense(state))


@register("uniter")
class UniterBackbone(Backbone):
    """UNITER's encoder; parameter names are the reference's (`uniter.` in a full state dict)."""

    prefix = "uniter"

    def __init__(self, sizes: BackboneSizes) -> None:
        """Build and initialise (normal(0, `initializer_range`)) from torch's default generator."""
        super().__init__()
        self.sizes = sizes
        self.hidden_size = sizes.hidden_size
        self.feature_width = sizes.feature_width
        self.vocabulary_size = sizes.vocabulary_size
        self.initializer_range = sizes.initializer_range
        self.uses_dropout = max(sizes.hidden_dropout_prob, sizes.attention_probs_dropout_prob) > 0
        self.embeddings = TextEmbeddings(sizes)
        self.img_embeddings = RegionEmbeddings(sizes)
        self.encoder = Encoder(sizes)
        self.pooler = Pooler(sizes.hidden_size)
        initialize(self, sizes.initializer_range)

    @property
    def word_embedding(self) -> Tensor:
        """[V, H] the word embedding parameter."""
        return self.embeddings.word_embeddings.weight

    @property
    def feature_projection(self) -> Tensor:
        """[H, D] the feature projection parameter."""
        return self.img_embeddings.img_linear.weight

    def embed(self, batch: Batch) -> Embeddings:
        """Word embeddings [B, T, H] and region features [B, R, D] with the mask embedding, in float32 or wider."""
        length = batch.input_ids.shape[1]
        if length > self.sizes.max_position_embeddings:
            raise ConfigError(
                f"model.max_position_embeddings: {self.sizes.max_position_embeddings} is too small for a text of "
                f"{length} tokens; raise it, or lower data.max_text_length"
            )
        wide = torch.promote_types(self.word_embedding.dtype, torch.float32)
        features = batch.features.to(wide)
        if batch.region_mask is not None:
            features = self.img_embeddings.mask(features, batch.region_mask)
        return Embeddings(self.embeddings.word_embeddings(batch.input_ids).to(wide), features)

    def compile_layers(self) -> None:
        """The encoder's; embeddings and heads stay as they are."""
        self.encoder.compile_layers()

    def encode(self, embeddings: Embeddings, batch: Batch) -> Encoded:
        """Final states of the slots that `batch.reads` asks for; the last layer computes no others."""
        layout = joint_layout(batch)
        hidden = take(self._embed_slots(embeddings, batch), layout.slots)
        states = self.encoder(hidden, layout.valid[:, None, None, :], self._query_positions(batch))
        if batch.reads is Reads.POOLED:
            return Encoded(states, self.pooler(states[:, 0]))
        if batch.reads is Reads.SLOTS:
            return Encoded(states.flatten(0, 1).index_select(0, _required(batch.read_packed)), None)
        valid = torch.cat([batch.text_valid, batch.region_valid], dim=1)
        slots = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        by_slot = take(states, joint_positions(batch, slots)).masked_fill(~valid.unsqueeze(-1), 0.0)
        return Encoded(by_slot, self.pooler(states[:, 0]))

    def _embed_slots(self, embeddings: Embeddings, batch: Batch) -> Tensor:
        """[B, T + R, H] in the encoder's type; up to here the type is that of `embeddings`, float32 or wider."""
        types = self.embeddings.token_type_embeddings  # the reference has no type table of its own for regions
        wide = embeddings.text.dtype
        text = self.embeddings(embeddings.text, types(batch.token_types).to(wide))
        regions = self.img_embeddings(embeddings.regions, batch.boxes.to(wide), types(batch.region_types).to(wide))
        return torch.cat([text, regions], dim=1).to(self.word_embedding.dtype)

    @staticmethod
    def _query_positions(batch: Batch) -> Tensor | None:
        """[B, Q] joint positions that are read, None for all."""
        if batch.reads is Reads.ALL:
            return None
        if batch.reads is Reads.POOLED:
            return torch.zeros(len(batch), 1, dtype=torch.int64, device=batch.input_ids.device)
        return joint_positions(batch, _required(batch.read_slots))


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a batch with Reads.SLOTS must carry read_slots and read_packed")
    return tensor
