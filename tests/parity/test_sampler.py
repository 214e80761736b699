"""The release's token-bucket sampler: its stored runs, and its invariants on our packing (FACTS section 4)."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.parity.golden import documents
from villa_ds.data.packing import pack
from villa_ds.errors import ConfigError

Batches = list[list[int]]


def release_epoch(case: dict[str, Any]) -> Batches:
    """One epoch of the release's procedure, on Python's own random state."""
    lens, budget, multiple = case["lens"], case["max_tokens"], case["size_multiple"]
    indices = list(range(len(lens)))
    random.shuffle(indices)
    batches: Batches = []
    for start in range(0, len(indices), case["bucket_size"]):
        bucket = sorted(indices[start : start + case["bucket_size"]], key=lambda index: lens[index], reverse=True)
        longest, batch = 0, []
        closed: Batches = []
        for place in range(0, len(bucket), multiple):
            added = bucket[place : place + multiple]
            longest = max(longest, *(lens[index] for index in added))  # never reset within a bucket
            if longest * (len(batch) + multiple) > budget:
                if not batch:
                    raise ValueError("budget")
                closed.append(batch)
                batch = []
            batch = batch + added
        batches += closed if case["droplast"] else [*closed, batch]
    random.shuffle(batches)
    return batches


@pytest.mark.parametrize("document", documents("sampler.json"))
def test_the_stored_runs_follow_from_the_described_procedure(document: dict[str, Any]) -> None:
    for case in document["cases"]:
        random.seed(case["seed"])
        if "error" in case:
            assert case["error"] == "ValueError"
            with pytest.raises(ValueError, match="budget"):
                release_epoch(case)
            continue
        epochs = [release_epoch(case) for _ in case["epochs"]]
        assert epochs == case["epochs"]
        assert [[len(batch) for batch in epoch] for epoch in epochs] == case["batch_sizes"]
        assert [sum(map(len, epoch)) for epoch in epochs] == case["n_indices_yielded"]
        padded = [[len(batch) * max(case["lens"][index] for index in batch) for batch in epoch] for epoch in epochs]
        assert padded == case["padded_tokens"]


@pytest.mark.parametrize("document", documents("sampler.json"))
def test_our_packing_keeps_the_invariants(document: dict[str, Any]) -> None:
    for case in document["cases"]:
        lens, multiple = np.array(case["lens"]), case["size_multiple"]
        ours = 0
        for start in range(0, len(lens), case["bucket_size"]):
            bucket = np.sort(lens[start : start + case["bucket_size"]])[::-1]
            if "error" in case:
                with pytest.raises(ConfigError, match=r"data\.tokens"):
                    pack(bucket, case["max_tokens"], multiple)
                continue
            bounds = pack(bucket, case["max_tokens"], multiple).tolist()
            assert (bounds[0], bounds[-1]) == (0, len(bucket))
            sizes = [after - before for before, after in pairwise(bounds)]
            assert all(size > 0 and size % multiple == 0 for size in sizes[:-1])
            for before, size in zip(bounds, sizes, strict=False):
                assert bucket[before] * (-(-size // multiple) * multiple) <= case["max_tokens"]
            ours += len(sizes)
        if "error" not in case and not case["droplast"]:
            assert all(ours <= len(epoch) for epoch in case["epochs"])  # the longest row is taken anew: never more
