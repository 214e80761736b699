"""Retrieval over a set, or the first images of it: every text is scored with every image, recall read off the scores.

Shape legend: G groups (images), N texts, n texts of a chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from villa_ds.batch import Batch, LossOutput
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.sizes import SPECIAL_TOKENS
from villa_ds.errors import ConfigError
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.retrieval import ImageTextRetrieval
from villa_ds.train.evaluate import Evaluated

RECALL_AT = (1, 5, 10)
MEAN_RECALL = "recall_mean"
_BLOCK = 1 << 22  # scores looked at in one go: bounds memory


class Ranker(Evaluated, Protocol):
    """What scores a gallery: an engine, or several models together."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def world(self) -> int:
        """How many processes share the images."""

    def gather(self, value: object) -> list[Any]:
        """The values of all ranks."""


@dataclass(frozen=True)
class Gallery:
    """The images that are ranked, the first `images` of a set (None: all), with all of their texts."""

    manifest: Manifest
    images: int | None = None

    @property
    def num_groups(self) -> int:
        """G."""
        return min(self.images or self.manifest.num_groups, self.manifest.num_groups)

    @property
    def pair_group(self) -> NDArray[Any]:
        """[N] the image of each text, ascending."""
        owners = self.manifest.index["pair_group"]
        return owners[: np.searchsorted(owners, self.num_groups)]

    def require_budget(self, tokens: int) -> None:
        """ConfigError if the longest text with the largest image exceeds `tokens`."""
        index, texts = self.manifest.index, len(self.pair_group)
        longest = int(index["pair_length"][:texts].max()) + SPECIAL_TOKENS
        longest += int(index["group_regions"][: self.num_groups].max())
        if longest > tokens:
            raise ConfigError(
                f"data.tokens: {tokens} does not do: the longest text with the largest image has {longest}"
            )


@torch.no_grad()
def score_gallery(
    ranker: Ranker,
    objective: ImageTextRetrieval,
    gallery: Gallery,
    tokens: int,
    paths: Sequence[Path],
    beside: Callable[[], Sequence[LossOutput]] = tuple,
    poll: Callable[[], None] | None = None,
) -> None:
    """Write float32 [G, N] scores to the `.npy` file `paths[0]`: row g, column t is how well text t fits image g.

    Images and texts are in the order of the index. Rank r of W scores the images r, r + W, ... with all texts, in
    passes of up to `tokens` padded tokens, which are the same for every W. Memory holds the texts' word pieces and one
    image. `beside` gives more outputs of the last pass (an ensemble's members), for the files after the first; `poll`
    is called by all ranks together before each image; it may raise. ConfigError as `Gallery.require_budget`.
    """
    gallery.require_budget(tokens)
    chunks = _chunks(gallery, objective, tokens)
    groups, owners, reader = gallery.num_groups, gallery.pair_group, ShardReader(gallery.manifest)
    if ranker.rank == 0:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(groups, len(owners))).flush()
    ranker.gather(None)  # the files are there
    files = [np.load(path, mmap_mode="r+", allow_pickle=False) for path in paths]
    first_pair = np.searchsorted(owners, np.arange(groups))
    ranker.module.eval()
    for number in range(ranker.rank, -(-groups // ranker.world) * ranker.world, ranker.world):
        if poll is not None:
            poll()
        group = min(number, groups - 1)  # a repeat keeps the ranks in step
        sample = reader.sample(int(first_pair[group]))
        image = collate([plain_example(sample, sample.regions, objective.vocabulary)], objective.reads)
        image = image.to(ranker.device)
        for chunk in chunks:
            output = ranker.probe(chunk.with_image(image), objective.name, None)
            if number < groups:
                for scores, one in zip(files, (output, *beside()), strict=True):
                    scores[group, chunk.pairs] = one.logits[:, 0].float().cpu().numpy()
    ranker.module.train()
    for scores in files:
        scores.flush()
    ranker.gather(None)  # every row is there


def recalls_of(path: Path, gallery: Gallery) -> Mapping[str, float]:
    """`recalls` of the scores in a file of `score_gallery`."""
    return recalls(np.load(path, mmap_mode="r", allow_pickle=False), gallery.pair_group)


def passing_recalls(
    ranker: Ranker,
    objective: ImageTextRetrieval,
    gallery: Gallery,
    tokens: int,
    path: Path,
    poll: Callable[[], None] | None = None,
) -> Mapping[str, float]:
    """`recalls` of a gallery, the same on all ranks; the scores are at `path` meanwhile, and gone after it."""
    try:
        score_gallery(ranker, objective, gallery, tokens, [path], poll=poll)
        found: Mapping[str, float] = ranker.gather(recalls_of(path, gallery) if ranker.rank == 0 else None)[0]
    finally:
        if ranker.rank == 0:
            path.unlink(missing_ok=True)
    return found


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


def _chunks(gallery: Gallery, objective: ImageTextRetrieval, tokens: int) -> list[_Chunk]:
    """All texts of a gallery, longest first, as many at a time as fit into `tokens` with the largest image."""
    index, reader = gallery.manifest.index, ShardReader(gallery.manifest)
    regions = int(index["group_regions"][: gallery.num_groups].max())
    lengths = np.asarray(index["pair_length"][: len(gallery.pair_group)], np.int64) + SPECIAL_TOKENS
    order = np.argsort(-lengths, kind="stable")
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
    return found | {MEAN_RECALL: float(np.mean(list(found.values())))}
