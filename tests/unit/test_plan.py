"""The guarantees of the plan (DESIGN section 4), on index arrays alone."""

import hashlib
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from villa_ds.data.lanes import BatchPlan, Position, Row, describe_plan, draw_task, lane_start, read_amplification
from villa_ds.data.line import cut_line, cut_shards, make_line
from villa_ds.data.packing import pack
from villa_ds.data.plan import DataPlan, MicroBatch, PlanSettings
from villa_ds.data.sizes import PAIR_ROW, RowRule, pair_row_text, pair_row_tokens
from villa_ds.errors import ConfigError, DataError
from villa_ds.rng import numbered_words

Index = dict[str, NDArray[Any]]
GROUP_BYTES = 1024
MAX_TEXT = 20
TOKENS = 8 * (MAX_TEXT + 2 + 12)  # the least budget that any pair of `make_index` fits eight times


def make_index(groups_per_shard: list[int], seed: int = 0, texts: int = 5) -> Index:
    """Index arrays of shards with these group counts; 1 to `texts` texts of 1..24 pieces a group, 2..12 regions."""
    rng = np.random.default_rng(seed)
    groups = sum(groups_per_shard)
    counts = rng.integers(1, texts + 1, groups)
    pairs = int(counts.sum())
    return {
        "group_shard": np.repeat(np.arange(len(groups_per_shard), dtype=np.int32), groups_per_shard),
        "group_offset": np.concatenate([np.arange(count) * GROUP_BYTES for count in groups_per_shard]),
        "group_regions": rng.integers(2, 13, groups).astype(np.int32),
        "pair_group": np.repeat(np.arange(groups), counts),
        "pair_slot": np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        "pair_length": rng.integers(1, 25, pairs).astype(np.int32),
        "pair_id": np.array([b"pair-%d" % pair for pair in range(pairs)]),
    }


def make_plan(index: Index, **changes: Any) -> DataPlan:
    values: dict[str, Any] = {
        "name": "set",
        "seed": 1,
        "tokens": TOKENS,
        "rows_multiple": 8,
        "window": 40,
        "max_text_length": MAX_TEXT,
    }
    shards = np.bincount(index["group_shard"]) * GROUP_BYTES + 512  # some bytes after the last group
    return DataPlan(index, shards.tolist(), PlanSettings(**(values | changes)))


def whole_epoch(plan: DataPlan, epoch: int) -> list[MicroBatch]:
    return [plan.micro_batch(epoch, number) for number in range(plan.epoch(epoch).micro_batches)]


def flat(batch: MicroBatch) -> tuple[Any, ...]:
    return batch.data, batch.epoch, batch.index, batch.pairs.tolist(), batch.negatives.tolist(), batch.ids


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_pairs_of_several_rows_stay_within_the_budget(rows: int) -> None:
    index = make_index([9, 4], seed=3)
    rule = RowRule(pair_row_text, lambda sizes: rows * pair_row_tokens(sizes))
    plan = make_plan(index, rules=(PAIR_ROW, rule), tokens=rows * TOKENS)
    lengths = index["pair_length"] + 2 + index["group_regions"][index["pair_group"]]
    batches = whole_epoch(plan, 0)
    assert all(len(batch.pairs) * rows * lengths[batch.pairs].max() <= rows * TOKENS for batch in batches)
    assert [batch.pairs.tolist() for batch in batches] == [
        batch.pairs.tolist() for batch in whole_epoch(make_plan(index), 0)
    ]
    with pytest.raises(ConfigError, match=r"data\.tokens"):
        make_plan(index, rules=(rule,))


shard_shapes = st.lists(st.integers(1, 9), min_size=1, max_size=13)
plans = st.builds(
    lambda shape, seed, window, lanes, probability: make_plan(
        make_index([*shape, 8], seed), seed=seed, window=window, lanes=lanes, negative_probability=probability
    ),  # of eight groups more some text is short enough to be taken
    shard_shapes,
    st.integers(0, 99),
    st.sampled_from([1, 7, 40, 1000]),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_pair_exactly_once_and_epochs_follow_each_other(plan: DataPlan) -> None:
    lanes = plan.settings.lanes
    delivered: list[MicroBatch] = []
    position = Position()
    while position.epoch < 3:
        row = Row(plan, lanes, position)
        position = row.after
        assert len(row) == lanes
        delivered += row
    places = [(batch.epoch, batch.index) for batch in delivered]
    counts = [plan.epoch(epoch).micro_batches for epoch in range(position.epoch + 1)]
    expected = [(epoch, index) for epoch, count in enumerate(counts) for index in range(count)]
    assert places == expected[: len(places)]
    lengths = plan._index["pair_length"]
    for epoch in range(3):
        pairs = np.concatenate([batch.pairs for batch in delivered if batch.epoch == epoch])
        assert sorted(pairs.tolist()) == np.flatnonzero(lengths <= MAX_TEXT).tolist()
    assert plan.left_out == (lengths > MAX_TEXT).sum()
    for batch in delivered:
        assert batch.ids == tuple(f"pair-{pair}" for pair in batch.pairs)


@given(plans, st.data())
@settings(max_examples=30, deadline=None)
def test_a_row_is_a_function_of_its_position_alone(plan: DataPlan, data: st.DataObject) -> None:
    """A seek on a fresh plan continues as the uninterrupted walk does; a second seek and one at a border too."""
    lanes = plan.settings.lanes
    positions, rows = [Position()], []
    while positions[-1].epoch < 3:
        row = Row(plan, lanes, positions[-1])
        after = row.after
        rows.append([flat(batch) for batch in row])
        positions.append(after)
    starts = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=2, max_size=2))
    boundary = next(place for place, position in enumerate(positions) if position.epoch > 0)
    for start in [*starts, min(boundary, len(rows) - 1)]:
        fresh = DataPlan(plan._index, (np.bincount(plan._index["group_shard"]) * 2048).tolist(), plan.settings)
        position = positions[start]
        for expected in rows[start:]:
            row = Row(fresh, lanes, position)
            position = row.after
            assert [flat(batch) for batch in row] == expected


@given(plans)
@settings(max_examples=60, deadline=None)
def test_micro_batches_keep_the_budget_and_the_multiple(plan: DataPlan) -> None:
    index, settings_ = plan._index, plan.settings
    real = padded = 0
    epoch = plan.epoch(0)
    for place, (start, stop) in enumerate(pairwise(epoch.first.tolist())):
        sizes = []
        for number in range(start, stop):
            batch = plan.micro_batch(0, number)
            regions = index["group_regions"][index["pair_group"][batch.pairs]]
            other = np.where(batch.negatives >= 0, index["group_regions"][batch.negatives], 0)
            lengths = index["pair_length"][batch.pairs] + 2 + np.maximum(regions, other)
            rounded = -(-len(lengths) // settings_.rows_multiple) * settings_.rows_multiple
            assert rounded * lengths.max() <= settings_.tokens
            assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
            sizes.append(len(lengths))
            real, padded = real + lengths.sum(), padded + len(lengths) * lengths.max()
        odd = [size for size in sizes if size % settings_.rows_multiple]
        assert len(odd) <= 1, f"window {place}: {sizes}"
    assert (real, padded) == (epoch.real_tokens, epoch.padded_tokens)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_negatives_are_other_groups_of_the_window(plan: DataPlan) -> None:
    index, probability = plan._index, plan.settings.negative_probability
    epoch = plan.epoch(1)
    batches = whole_epoch(plan, 1)
    window_groups = []
    for start, stop in pairwise(epoch.windows.tolist()):
        blocks = epoch.line[start:stop]
        spans = zip(plan._blocks.group_start[blocks], plan._blocks.group_stop[blocks], strict=True)
        window_groups.append({group for low, high in spans for group in range(low, high)})
    for place, (start, stop) in enumerate(pairwise(epoch.first.tolist())):
        allowed = window_groups[place]
        if len(allowed) == 1:  # it borrows from its neighbour
            allowed = allowed | window_groups[place + 1 if place + 1 < len(window_groups) else place - 1]
        for batch in batches[start:stop]:
            taken = batch.negatives >= 0
            assert taken.tolist() == (batch.draws < probability).tolist()
            assert set(batch.negatives[taken].tolist()) <= allowed
            assert not (batch.negatives == index["pair_group"][batch.pairs]).any()
            assert batch.negatives_for(0.0).tolist() == [-1] * len(batch.pairs)
            assert batch.negatives_for(probability).tolist() == batch.negatives.tolist()


def test_negatives_are_uniform_over_the_other_groups() -> None:
    plan = make_plan(make_index([4], texts=1), negative_probability=0.5, max_text_length=None)
    counts: Counter[tuple[int, int]] = Counter()
    for epoch in range(1000):
        for batch in whole_epoch(plan, epoch):
            counts.update(zip(batch.pairs.tolist(), batch.negatives.tolist(), strict=True))
    for pair in range(4):
        assert abs(counts[pair, -1] - 500) < 80  # five standard deviations
        for other in {0, 1, 2, 3} - {pair}:
            assert abs(counts[pair, other] - 500 / 3) < 60


def test_a_smaller_share_of_negatives_is_a_part_of_the_larger() -> None:
    plan = make_plan(make_index([30]), negative_probability=0.8)
    batches = whole_epoch(plan, 0)
    small = np.concatenate([batch.negatives_for(0.3) for batch in batches])
    large = np.concatenate([batch.negatives for batch in batches])
    assert (small[small >= 0] == large[small >= 0]).all()
    assert 0.15 < (small >= 0).mean() < 0.45
    assert 0.65 < (large >= 0).mean() < 0.95


@given(
    st.integers(2, 8),
    st.integers(10, 23),
    st.lists(st.integers(2, 6), min_size=1, max_size=9),
    st.sampled_from([1, 30, 500]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_ten_shards_a_lane_bound_what_is_read_twice(
    lanes: int, per_lane: int, shape: list[int], window: int, seed: int
) -> None:
    shards = lanes * per_lane
    index = make_index([shape[shard % len(shape)] for shard in range(shards)], seed)
    plan = make_plan(index, seed=seed, window=window, lanes=lanes, negative_probability=0.5)
    opened = set()
    position = Position()
    while position.epoch < 2:
        row = Row(plan, lanes, position)
        position = row.after
        for lane, batch in enumerate(row):
            groups = [*index["pair_group"][batch.pairs], *batch.negatives[batch.negatives >= 0]]
            opened |= {(batch.epoch, lane, shard) for shard in index["group_shard"][groups].tolist()}
    for epoch in range(2):
        assert sum(place[0] == epoch for place in opened) <= 1.1 * shards


def test_read_amplification_counts_the_windows_that_two_ranks_open() -> None:
    index = make_index([4] * 8, texts=1)
    plan = make_plan(index, window=8, lanes=4, max_text_length=None, tokens=400)
    assert plan.epoch(0).micro_batches == 8  # one a shard
    assert read_amplification(plan, 0, BatchPlan(4, 4)) == 1.0
    assert read_amplification(plan, 0, BatchPlan(4, 1)) == 1.0
    odd = make_plan(make_index([12] * 3, texts=1), window=12, lanes=2, max_text_length=None, tokens=400)
    assert odd.epoch(0).first.tolist() == [0, 2, 4, 6]  # the second lane begins in the middle of the second shard
    assert read_amplification(odd, 0, BatchPlan(2, 2)) == pytest.approx(4 / 3)
    assert "read amplification 1.333" in describe_plan(odd, 0, BatchPlan(2, 2))


def test_a_line_keeps_the_blocks_of_a_shard_together_and_windows_whole() -> None:
    index = make_index([30, 3, 3, 3, 60], texts=1)
    blocks = cut_shards(index, np.array([30, 3, 3, 3, 60]) * GROUP_BYTES, window=10)
    assert blocks.shard.tolist() == [0] * 3 + [1, 2, 3] + [4] * 6
    assert blocks.pairs.tolist() == [10] * 3 + [3] * 3 + [10] * 6
    assert blocks.bytes.tolist() == (blocks.pairs * GROUP_BYTES).tolist()
    line = make_line(blocks, 3, "set", 0)
    assert sorted(line.tolist()) == list(range(12))
    order = blocks.shard[line].tolist()
    assert [shard for shard, after in pairwise([*order, -1]) if shard != after] == list(dict.fromkeys(order))
    assert make_line(blocks, 3, "set", 1).tolist() != line.tolist()
    straight = np.arange(12)
    assert cut_line(blocks, straight, 10, 99).tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert cut_line(blocks, straight, 10, 2).tolist() == [0, 1, 2, 3, 5, 7, 8, 9, 10, 11, 12]
    assert cut_line(blocks, straight, 20, 99).tolist() == [0, 2, 6, 8, 10, 12]


def test_blocks_are_whole_groups() -> None:
    index = make_index([40], texts=9)
    blocks = cut_shards(index, np.array([40 * GROUP_BYTES]), window=20)
    assert len(blocks.shard) > 5
    assert blocks.pair_start.tolist() == np.searchsorted(index["pair_group"], blocks.group_start).tolist()
    assert blocks.group_stop[:-1].tolist() == blocks.group_start[1:].tolist()
    assert (blocks.group_start[0], blocks.group_stop[-1]) == (0, 40)
    assert np.abs(blocks.pairs - 20).max() <= 9


def test_the_order_of_a_set_is_pinned() -> None:
    """A checkpoint holds two integers: a change of this digest breaks every run that is to be resumed."""
    index = make_index([9, 4, 30, 2, 7], texts=1)
    index["pair_length"] = (np.arange(52, dtype=np.int32) * 7) % 24 + 1
    index["group_regions"] = (np.arange(52, dtype=np.int32) * 5) % 11 + 2
    plan = make_plan(index, window=20, lanes=3, negative_probability=0.5)
    digest = hashlib.sha256()
    position = Position()
    for _ in range(30):
        row = Row(plan, 3, position)
        position = row.after
        digest.update(repr([flat(batch) for batch in row]).encode())
    assert position == Position(11, 2)
    assert digest.hexdigest() == "a180b7088d4df6f6a17427199d03831e369e7a16e3beff1fe9f81181d6c1a1dd"


@pytest.mark.parametrize("changes", [{"seed": 2}, {"name": "other"}])
def test_seed_name_and_epoch_change_the_order(changes: dict[str, Any]) -> None:
    index = make_index([9, 4, 30, 2, 7])
    pairs = np.concatenate([batch.pairs for batch in whole_epoch(make_plan(index), 0)]).tolist()
    other = np.concatenate([batch.pairs for batch in whole_epoch(make_plan(index, **changes), 0)]).tolist()
    later = np.concatenate([batch.pairs for batch in whole_epoch(make_plan(index), 1)]).tolist()
    assert pairs != other
    assert pairs != later
    assert other != later


def test_a_set_smaller_than_a_step_gives_several_epochs_to_a_row() -> None:
    plan = make_plan(make_index([1], texts=1), lanes=4)
    row = Row(plan, 4, Position(5, 0))
    position = row.after
    assert [(batch.epoch, batch.pairs.tolist()) for batch in row] == [(epoch, [0]) for epoch in (5, 6, 7, 8)]
    assert position == Position(9, 0)


def test_what_cannot_be_planned_is_refused_with_the_mend() -> None:
    index = make_index([4, 4])
    index["pair_length"][3] = 19
    index["group_regions"][index["pair_group"][3]] = 40
    with pytest.raises(ConfigError, match=r"data\.tokens: 487 .*'pair-3' of data set set has length 61, and 8 .* 488"):
        make_plan(index, tokens=487)
    make_plan(index, tokens=488)
    index["pair_length"][0] = 20
    with pytest.raises(ConfigError, match="with the largest mismatched image has length 62"):
        make_plan(index, tokens=488, negative_probability=0.1)
    with pytest.raises(DataError, match=r"set: each of its \d+ texts has more than 0 word pieces"):
        make_plan(index, max_text_length=0)
    with pytest.raises(DataError, match="set: mismatched images are wanted, but it has a single group"):
        make_plan(make_index([1]), negative_probability=0.5)


def test_batch_plan_shares_the_lanes_evenly_or_refuses() -> None:
    for world in (1, 2, 3, 4, 6, 12):
        plan = BatchPlan(12, world)
        lanes = [lane for rank in range(world) for lane in plan.lanes_of(rank)]
        assert lanes == list(range(12))
        assert {len(plan.lanes_of(rank)) for rank in range(world)} == {plan.lanes_per_rank}
        assert BatchPlan.from_dict(plan.to_dict()) == plan
    with pytest.raises(ConfigError, match=r"data\.lanes: 12 .* 5 ranks; start 1, 2, 3, 4, 6, 12 ranks"):
        BatchPlan(12, 5)
    assert BatchPlan(12, 4).describe(10240) == (
        "an optimizer step is the mean of 12 micro-batches of up to 10240 tokens: 4 ranks with 3 each"
    )


def test_lane_runs_cover_an_epoch_and_differ_by_one() -> None:
    for count in range(30):
        for lanes in range(1, 9):
            starts = [lane_start(count, lanes, lane) for lane in range(lanes + 1)]
            assert (starts[0], starts[-1]) == (0, count)
            sizes = [after - start for start, after in pairwise(starts)]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] - sizes[-1] <= 1


def test_tasks_are_drawn_by_weight_and_step() -> None:
    drawn = [draw_task(7, step, [1.0, 2.0, 5.0]) for step in range(4000)]
    assert drawn == [draw_task(7, step, [1, 2, 5]) for step in range(4000)]
    assert drawn != [draw_task(8, step, [1.0, 2.0, 5.0]) for step in range(4000)]
    for task, share in enumerate([1 / 8, 2 / 8, 5 / 8]):
        assert abs(drawn.count(task) / 4000 - share) < 0.03
    assert {draw_task(7, step, [3.0]) for step in range(9)} == {0}


def test_pack_evens_out_the_last_two() -> None:
    assert pack(np.full(27, 10), 240, 8).tolist() == [0, 16, 27]  # not 24 and 3
    assert pack(np.full(11, 10), 240, 8).tolist() == [0, 11]
    assert pack(np.full(11, 10), 80, 8).tolist() == [0, 8, 11]  # nothing to take from 8
    assert pack(np.array([30] * 8 + [10] * 20), 240, 8).tolist() == [0, 8, 28]  # short rows get more of them
    assert pack(np.array([5, 4, 3]), 5, 1).tolist() == [0, 1, 2, 3]
    assert pack(np.zeros(0, np.int64), 80, 8).tolist() == [0]
    with pytest.raises(ConfigError, match=r"data\.tokens: 79 .* length 10, and 8 such rows .* need 80"):
        pack(np.full(3, 10), 79, 8)


def test_numbered_words_do_not_depend_on_how_a_range_is_cut() -> None:
    whole = numbered_words(5, 7, "path", 1)
    parts = [numbered_words(5, 3, "path", 1), numbered_words(8, 4, "path", 1)]
    assert whole.shape == (7, 4)
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert len(set(whole.flatten().tolist())) == 28
