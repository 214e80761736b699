"""Retrieval over a whole set: every text is scored with every image, and recall is read off the scores.

Shape legend: G groups (images), N texts, n texts of a chunk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from villa_ds.batch import Batch
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.sizes import SPECIAL_TOKENS
from villa_ds.errors import ConfigError
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.retrieval import ImageTextRetrieval
from villa_ds.train.torch_engine import Engine

RECALL_AT = (1, 5, 10)
_BLOCK = 1 << 22  # scores looked at in one go: bounds memory


@torch.no_grad()
def score_gallery(engine: Engine, objective: ImageTextRetrieval, manifest: Manifest, tokens: int, path: Path) -> None:
    """Write float32 [G, N] scores to the `.npy` file `path`: row g, column t is how well text t fits image g.

    Images and texts are in the order of the index. Rank r of W scores the images r, r + W, ... with all texts, in
    passes of up to `tokens` padded tokens, which are the same for every W. Memory holds the texts' word pieces and one
    image. ConfigError if the largest image with the longest text exceeds `tokens`.
    """
    chunks = _chunks(manifest, objective, tokens)
    groups, reader = manifest.num_groups, ShardReader(manifest)
    if engine.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(groups, manifest.num_pairs)).flush()
    engine.gather(None)  # the file is there
    scores = np.load(path, mmap_mode="r+", allow_pickle=False)
    first_pair = np.searchsorted(manifest.index["pair_group"], np.arange(groups))
    engine.module.eval()
    for number in range(engine.rank, -(-groups // engine.world) * engine.world, engine.world):
        group = min(number, groups - 1)  # a repeat keeps the ranks in step
        sample = reader.sample(int(first_pair[group]))
        image = collate([plain_example(sample, sample.regions, objective.vocabulary)], objective.reads)
        image = image.to(engine.device)
        for chunk in chunks:
            output = engine.probe(chunk.with_image(image), objective.name, None)
            if number < groups:
                scores[group, chunk.pairs] = output.logits[:, 0].float().cpu().numpy()
    engine.module.train()
    scores.flush()
    engine.gather(None)  # every row is there


@dataclass(frozen=True)
class _Chunk:
    """Texts that are scored together, as a batch whose images are to be replaced."""

    pairs: NDArray[np.int64]  # [n]
    texts: Batch

    def with_image(self, image: Batch) -> Batch:
        """Every text with the one image of `image`."""
        texts, rows = self.texts.to(image.features.device), len(self.pairs)
        count = image.features.shape[1]
        return replace(
            texts,
            features=image.features.expand(rows, -1, -1),
            boxes=image.boxes.expand(rows, -1, -1),
            region_types=image.region_types.expand(rows, -1),
            region_counts=image.region_counts.expand(rows),
            joint_length=texts.input_ids.shape[1] + count,
            tokens=texts.tokens + rows * count,
        )


def _chunks(manifest: Manifest, objective: ImageTextRetrieval, tokens: int) -> list[_Chunk]:
    """All texts of a set, longest first, as many at a time as fit into `tokens` with the largest image."""
    index, reader = manifest.index, ShardReader(manifest)
    regions = int(index["group_regions"].max())
    lengths = np.asarray(index["pair_length"], np.int64) + SPECIAL_TOKENS
    order = np.argsort(-lengths, kind="stable")
    if int(lengths.max()) + regions > tokens:
        longest = int(lengths.max()) + regions
        raise ConfigError(f"data.tokens: {tokens} does not do: the longest text with the largest image has {longest}")
    chunks, start = [], 0
    while start < len(order):
        pairs = order[start : start + tokens // (int(lengths[order[start]]) + regions)]
        examples = []
        for pair in pairs.tolist():
            sample = reader.sample(pair)
            nothing = replace(sample.regions, features=sample.regions.features[:0], boxes=sample.regions.boxes[:0])
            examples.append(plain_example(sample, nothing, objective.vocabulary))
        chunks.append(_Chunk(pairs, replace(collate(examples, objective.reads), ids=("gallery",))))
        start += len(pairs)
    return chunks


def recalls(scores: NDArray[np.floating], pair_group: NDArray[Any]) -> Mapping[str, float]:
    """Recall at 1, 5 and 10 in both directions of `scores` [G, N], where text t belongs to image `pair_group[t]`.

    `image_recall_at_k` is the share of texts whose image is among the k best scored images, `text_recall_at_k` the
    share of images with one of their texts among the k best scored texts; `recall_mean` is the mean of all six. What
    scores like a right one counts as ranked before it: a model that scores all alike has recall 0.
    """
    owner = np.asarray(pair_group, np.int64)
    columns = np.arange(len(owner))
    of_own_image = np.asarray(scores[owner, columns])
    before_image = np.zeros(len(owner), np.int64)  # how many images rank before the text's own
    before_text = []  # how many texts rank before the best of an image's own
    rows = max(1, _BLOCK // len(owner))
    for start in range(0, len(scores), rows):
        block = np.asarray(scores[start : start + rows])
        own = owner == np.arange(start, start + len(block))[:, None]
        before_image += ((block >= of_own_image) & ~own).sum(0)
        best = np.where(own, block, -np.inf).max(1, keepdims=True)
        before_text.append(((block >= best) & ~own).sum(1))
    ranks = {"image": before_image, "text": np.concatenate(before_text)}
    found = {f"{what}_recall_at_{k}": float((before < k).mean()) for what, before in ranks.items() for k in RECALL_AT}
    return found | {"recall_mean": float(np.mean(list(found.values())))}
