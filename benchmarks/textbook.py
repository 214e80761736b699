"""UNITER with its question answering head as a textbook writes it: what the steps here are measured against.

Separate query, key and value projections; attention as two products around a softmax over all heads; every layer
computed at every position; GELU from its formula; padded rows. The arithmetic is the reference's, so with dropout off
its loss and gradients equal those of the same weights here, which `step.py` checks before it times anything.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.models.presets import BackboneSizes
from villa_ds.models.weights import to_reference

EPS = 1e-12


class SelfAttention(nn.Module):
    """Softmax(Q K^T / sqrt(d) + mask) V with its output projection."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads = sizes.num_attention_heads
        self.dropout = nn.Dropout(sizes.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, J, H] to [B, J, H]."""
        query, key, value = (self._split(layer(hidden)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        context = self.dropout(scores.softmax(-1)) @ value
        return context.permute(0, 2, 1, 3).contiguous().flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, -1).permute(0, 2, 1, 3)


class Output(nn.Module):
    """Projection, dropout, residual, LayerNorm."""

    def __init__(self, width_in: int, sizes: BackboneSizes) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, sizes.hidden_size)
        self.LayerNorm = nn.LayerNorm(sizes.hidden_size, eps=EPS)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """[B, J, in] and [B, J, H] to [B, J, H]."""
        output: Tensor = self.LayerNorm(self.dropout(self.dense(states)) + residual)
        return output


class Layer(nn.Module):
    """Names as in the reference's state dict."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(sizes), "output": Output(sizes.hidden_size, sizes)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.hidden_size, sizes.intermediate_size)})
        self.output = Output(sizes.intermediate_size, sizes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, J, H] to [B, J, H]."""
        attended = self.attention["output"](self.attention["self"](hidden, mask), hidden)
        wide = self.intermediate["dense"](attended)
        output: Tensor = self.output(wide * 0.5 * (1.0 + torch.erf(wide / math.sqrt(2.0))), attended)
        return output


class TextbookUniter(nn.Module):
    """The whole model; `load` gives it the weights of a `TrainModule`."""

    def __init__(self, sizes: BackboneSizes, answers: int) -> None:
        super().__init__()
        width, drop = sizes.hidden_size, sizes.hidden_dropout_prob

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=EPS)

        text = {
            "word_embeddings": nn.Embedding(sizes.vocabulary_size, width, padding_idx=0),
            "position_embeddings": nn.Embedding(sizes.max_position_embeddings, width),
            "token_type_embeddings": nn.Embedding(sizes.type_vocab_size, width),
            "LayerNorm": norm(),
        }
        image = {
            "img_linear": nn.Linear(sizes.feature_width, width),
            "img_layer_norm": norm(),
            "pos_layer_norm": norm(),
            "pos_linear": nn.Linear(7, width),
            "mask_embedding": nn.Embedding(2, sizes.feature_width),
            "LayerNorm": norm(),
        }
        parts = {
            "embeddings": nn.ModuleDict(text),
            "img_embeddings": nn.ModuleDict(image),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))}),
            "pooler": nn.ModuleDict({"dense": nn.Linear(width, width)}),
        }
        self.uniter = nn.ModuleDict(parts)
        self.vqa_output = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width, eps=EPS), nn.Linear(2 * width, answers)
        )
        self.dropout = nn.Dropout(drop)

    def load(self, module: nn.Module) -> "TextbookUniter":
        """The weights of `module`, which must be of the same sizes."""
        self.load_state_dict(to_reference(module.state_dict()))
        return self

    def forward(self, batch: Batch, perturbation: Perturbation | None = None) -> LossOutput:
        """Loss: binary cross entropy summed over answers, mean over rows. Perturbations where VILLA adds them."""
        text, image = self.uniter["embeddings"], self.uniter["img_embeddings"]
        types = text["token_type_embeddings"]
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None]
        words, features = text["word_embeddings"](batch.input_ids), batch.features.float()
        if perturbation is not None and perturbation.text is not None:
            words = words + perturbation.text
        if perturbation is not None and perturbation.regions is not None:
            features = features + perturbation.regions
        words = words + text["position_embeddings"](positions) + types(batch.token_types)
        boxes = image["pos_layer_norm"](image["pos_linear"](batch.boxes))
        regions = image["img_layer_norm"](image["img_linear"](features)) + boxes
        regions = image["LayerNorm"](regions + types(torch.ones_like(batch.region_types)))
        hidden = torch.cat([self.dropout(text["LayerNorm"](words)), self.dropout(regions)], dim=1)
        gather, valid = self._layout(batch)
        hidden = hidden.gather(1, gather.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        mask = (1.0 - valid[:, None, None, :].float()) * -10000.0
        for layer in self.uniter["encoder"]["layer"]:
            hidden = layer(hidden, mask)
        logits = self.vqa_output(torch.tanh(self.uniter["pooler"]["dense"](hidden[:, 0])))
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets["scores"], reduction="none")
        return LossOutput(losses.mean() * losses.shape[1], logits, losses, {})

    @staticmethod
    def _layout(batch: Batch) -> tuple[Tensor, Tensor]:
        """Gather index and validity [B, J], built row by row as the reference's collation does."""
        padded, total = batch.input_ids.shape[1], batch.joint_length
        index = torch.arange(total)[None].repeat(len(batch), 1)
        valid = torch.zeros(len(batch), total, dtype=torch.bool)
        for row, (words, regions) in enumerate(
            zip(batch.text_lengths.tolist(), batch.region_counts.tolist(), strict=True)
        ):
            index[row, words : words + regions] = torch.arange(padded, padded + regions)
            valid[row, : words + regions] = True
        return index.to(batch.input_ids.device), valid.to(batch.input_ids.device)


class TextbookPasses:
    """Passes of one micro-batch for `villa_ds.train.adversary`: straight through the model, gradients as they come."""

    stochastic, keeps_clean_graph, gradient_scale = True, True, 1.0

    def __init__(self, model: TextbookUniter, batch: Batch) -> None:
        self.model, self.batch = model, batch

    def forward(self, perturbation: Perturbation | None, mask_draw: int) -> LossOutput:
        """A pass."""
        output: LossOutput = self.model(self.batch, perturbation)
        return output

    forward_kept = probe = forward

    def backward(self, scalar: Tensor, *, final: bool, retain_graph: bool = False) -> None:
        """Accumulate."""
        scalar.backward(retain_graph=retain_graph)
