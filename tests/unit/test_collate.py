"""Collation: padding, read slots, packed targets."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from villa_ds.batch import Example, Reads
from villa_ds.data.collate import collate


def make_example(seed: int, text: int, regions: int, masked: int = 0, dtype: type = np.float16) -> Example:
    """An example that reads its last text position and its first `masked` regions."""
    rng = np.random.default_rng(seed)
    mask = np.arange(regions) < masked
    features = rng.normal(size=(regions, 4)).astype(dtype)
    return Example(
        id=f"e{seed}",
        input_ids=rng.integers(1, 50, text),
        token_types=np.zeros(text, np.int64),
        features=np.where(mask[:, None], dtype(0), features),
        boxes=rng.random((regions, 7), np.float32),
        region_types=np.ones(regions, np.int64),
        region_mask=mask if masked else None,
        read_text=np.array([text - 1]),
        read_regions=np.flatnonzero(mask) if masked else None,
        targets={"number": np.arange(1 + masked, dtype=np.int32), "soft": rng.random((1, 3)).astype(np.float16)},
    )


def test_a_batch_holds_what_its_examples_hold_and_zeros() -> None:
    examples = [make_example(0, 3, 2), make_example(1, 5, 1)]
    batch = collate(examples, Reads.POOLED)
    assert batch.ids == ("e0", "e1")
    assert batch.input_ids.tolist() == [[*examples[0].input_ids.tolist(), 0, 0], examples[1].input_ids.tolist()]
    assert batch.token_types.tolist() == [[0] * 5, [0] * 5]
    assert batch.text_lengths.tolist() == [3, 5]
    assert batch.region_counts.tolist() == [2, 1]
    assert batch.region_types.tolist() == [[1, 1], [1, 0]]
    assert (batch.joint_length, batch.tokens) == (6, 11)
    assert batch.features.dtype == torch.float16
    assert batch.features[0].numpy().tolist() == examples[0].features.tolist()
    assert batch.features[1].numpy().tolist() == [examples[1].features[0].tolist(), [0.0] * 4]
    assert batch.boxes[1].numpy().tolist() == [examples[1].boxes[0].tolist(), [0.0] * 7]
    assert (batch.region_mask, batch.read_slots, batch.read_packed) == (None, None, None)
    assert batch.targets["number"].tolist() == [0, 0]
    assert batch.targets["number"].dtype == torch.int64
    assert batch.targets["soft"].dtype == torch.float32
    assert batch.targets["soft"][1].tolist() == examples[1].targets["soft"][0].tolist()


def test_rows_of_one_sample_stay_together() -> None:
    one, two = make_example(0, 3, 2), make_example(1, 5, 1)
    further = dataclasses.replace(make_example(2, 4, 3), targets={})
    batch = collate([dataclasses.replace(one, further_rows=(further,)), two], Reads.POOLED)
    assert batch.ids == ("e0", "e1")
    assert batch.text_lengths.tolist() == [3, 4, 5]
    assert batch.region_counts.tolist() == [2, 3, 1]
    assert (len(batch), batch.joint_length, batch.tokens) == (3, 7, 18)
    assert batch.input_ids[1, :4].tolist() == further.input_ids.tolist()
    assert len(batch.targets["soft"]) == 2


def test_read_slots_count_text_first_and_line_up_with_targets() -> None:
    batch = collate([make_example(0, 3, 4, masked=2), make_example(1, 5, 2)], Reads.SLOTS)
    assert batch.read_slots is not None
    assert batch.read_packed is not None
    assert batch.region_mask is not None
    assert batch.read_slots.tolist() == [[2, 5, 6], [4, 0, 0]]  # T is 5
    assert batch.read_packed.tolist() == [0, 1, 2, 3]
    assert batch.read_slots.flatten()[batch.read_packed].tolist() == [2, 5, 6, 4]
    assert batch.targets["number"].tolist() == [0, 1, 2, 0]
    assert batch.region_mask.tolist() == [[True, True, False, False], [False] * 4]


def test_features_take_the_widest_stored_type() -> None:
    mixed = [make_example(0, 3, 2), make_example(1, 3, 2, dtype=np.float32)]
    assert collate(mixed, Reads.POOLED).features.dtype == torch.float32


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5)


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_collation_leaves_examples_alone_and_loses_nothing(shapes: list[tuple[int, int, int]]) -> None:
    examples = [
        make_example(seed, text, regions, min(masked, regions)) for seed, (text, regions, masked) in enumerate(shapes)
    ]
    for example in examples:
        for item in dataclasses.fields(example):
            if isinstance(value := getattr(example, item.name), np.ndarray):
                value.setflags(write=False)  # an in-place change would raise
    batch = collate(examples, Reads.SLOTS)
    assert batch.read_slots is not None
    assert batch.read_packed is not None
    batch.features.add_(1)  # nor is memory shared
    batch.features.sub_(1)
    width, slots = batch.input_ids.shape[1], batch.read_slots.shape[1]
    read = [(int(flat) // slots, int(batch.read_slots.flatten()[flat])) for flat in batch.read_packed]
    expected = []
    for row, example in enumerate(examples):
        assert batch.input_ids[row][batch.text_valid[row]].tolist() == example.input_ids.tolist()
        assert not batch.input_ids[row][~batch.text_valid[row]].any()
        assert not batch.features[row][~batch.region_valid[row]].any()
        assert batch.boxes[row][batch.region_valid[row]].tolist() == example.boxes.tolist()
        expected.append((row, len(example.input_ids) - 1))
        expected += [(row, width + region) for region in ([] if example.read_regions is None else example.read_regions)]
    assert read == expected
    assert len(batch.targets["number"]) == len(read)
