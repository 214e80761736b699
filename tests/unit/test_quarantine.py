"""Damage in a training set: what is lost, what comes instead, what is counted, and when it is too much."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.preparers import Plain
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader, Loader, StepBatches
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.quarantine import Damage, DamagedError, Entry, Quarantine
from villa_ds.data.reader import ShardReader
from villa_ds.errors import DamageError

LANES, SEED = 4, 5
DATA = DataConfig(lanes=LANES, tokens=150, rows_multiple=2, window=30, max_text_length=11, workers=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("sound") / "set", groups=40, texts_per_group=3, shards=5)


@pytest.fixture(scope="module")
def sick(sound: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Groups 3 and 30 are damaged, and shard 2 (groups 16 to 23) is torn."""
    folder = Path(shutil.copytree(sound.folder, tmp_path_factory.mktemp("sick") / "set"))
    for group in (3, 30):
        break_group(sound, folder, group)
    path = folder / sound.shards[2].name
    path.write_bytes(path.read_bytes()[:-512])
    return load_manifest(folder)


def break_group(manifest: Manifest, folder: Path, group: int) -> None:
    """Overwrite the magic of the group's first tar header."""
    shard, offset = (int(manifest.index[f"group_{name}"][group]) for name in ("shard", "offset"))
    with (folder / manifest.shards[shard].name).open("r+b") as file:
        file.seek(offset + 257)
        file.write(b"xxxxx")


def lost_groups() -> set[int]:
    return {3, 30, *range(16, 24)}


def pairs_of(manifest: Manifest, groups: set[int]) -> set[str]:
    chosen = np.isin(manifest.index["pair_group"], sorted(groups))
    return {name.decode() for name in manifest.index["pair_id"][chosen].tolist()}


def make_loader(
    manifest: Manifest, steps: int, negatives: float = 0.5, *, world: int = 1, rank: int = 0, **changes: int
) -> Loader:
    tasks = [("set", Plain("match", negatives), 1.0)]
    data = dataclasses.replace(DATA, **changes)
    return Loader({"set": manifest}, tasks, data, SEED, BatchPlan(LANES, world), rank, steps)


Line = tuple[int, list[tuple[tuple[str, ...], str]], frozenset[Damage]]


def run(manifest: Manifest, steps: int, world: int = 1, workers: int = 0) -> list[Line]:
    """(step, ids and digest of each global micro-batch, what was met) as `world` ranks deliver it."""
    loaders = [make_loader(manifest, steps, world=world, rank=rank, workers=workers) for rank in range(world)]
    return [
        (
            ranks[0].step,
            [(batch.ids, digest(batch)) for got in ranks for batch in got.batches],
            frozenset(damage for got in ranks for damage in got.damage),
        )
        for ranks in zip(*loaders, strict=True)
    ]


def epoch(manifest: Manifest, negatives: float) -> Iterator[StepBatches]:
    """The steps that lie in epoch 0 altogether."""
    for step in make_loader(manifest, 100, negatives):
        if any(micro.epoch for micro in step.micro_batches):
            return
        yield step


def test_every_world_and_worker_count_delivers_the_same(sick: Manifest) -> None:
    reference = run(sick, 16)
    assert len({damage.shard for _, _, met in reference for damage in met}) == 3
    for world, workers in ((2, 0), (4, 0), (2, 1), (1, 2)):
        assert run(sick, 16, world, workers) == reference


def test_a_resume_delivers_the_same(sick: Manifest) -> None:
    reference = run(sick, 12)
    first = make_loader(sick, 12)
    for step in first:
        if step.step == 5:
            break
    tasks = [("set", Plain("match", 0.5), 1.0)]
    rest = Loader({"set": sick}, tasks, DATA, SEED, BatchPlan(LANES), 0, 12, first.state())
    found = [(step.step, [(batch.ids, digest(batch)) for batch in step.batches]) for step in rest]
    assert found == [line[:2] for line in reference[5:]]


def test_sound_pairs_come_as_they_would_and_damaged_ones_not_at_all(sound: Manifest, sick: Manifest) -> None:
    """Without mismatched images every sound pair comes once an epoch, and more often only to stand in."""
    lost = pairs_of(sound, lost_groups())
    seen: list[str] = []
    stood_in = False
    for step, wanted in zip(epoch(sick, 0.0), epoch(sound, 0.0), strict=True):
        for batch, planned in zip(step.batches, wanted.batches, strict=True):
            assert len(batch) * batch.joint_length <= 150
            assert not lost.intersection(batch.ids)
            left = tuple(name for name in planned.ids if name not in lost)
            if left:
                assert batch.ids == left
                seen += batch.ids
                assert left != planned.ids or digest(batch) == digest(planned)
            else:
                assert 1 <= len(batch.ids) <= len(planned.ids)
                stood_in = True
    assert stood_in
    assert len(seen) == len(set(seen))


def test_a_pair_whose_mismatched_image_is_damaged_waits_for_the_next_epoch(sound: Manifest, sick: Manifest) -> None:
    lost, checked = pairs_of(sound, lost_groups()), 0
    for step in epoch(sick, 0.5):
        for batch, micro in zip(step.batches, step.micro_batches, strict=True):
            negatives = micro.negatives_for(0.5).tolist()
            left = [
                name
                for name, other in zip(micro.ids, negatives, strict=True)
                if name not in lost and other not in lost_groups()
            ]
            checked += sum(other in lost_groups() for other in negatives)
            assert not left or list(batch.ids) == left
    assert checked > 3


def test_what_stands_in_is_drawn_for_each_row(tmp_path: Path) -> None:
    """A lost shard must not make one neighbour come again and again."""
    manifest = make_shards(tmp_path, groups=60, texts_per_group=1, shards=2, regions=(4, 5), words=(5, 6))
    (tmp_path / "shard-000001.tar").unlink()
    stood_in = [
        name
        for step in epoch(manifest, 0.0)
        for batch, micro in zip(step.batches, step.micro_batches, strict=True)
        for name in batch.ids
        if name not in micro.ids
    ]
    assert len(set(stood_in)) > len(stood_in) / 2 > 5
    assert {int(name[1:]) < 30 for name in stood_in} == {True}


def test_a_set_without_a_sound_pair_says_so(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, groups=6, shards=1)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(DamageError, match=r"shard-000000\.tar: cannot be opened: No such file or directory; copy"):
        next(iter(make_loader(manifest, 1)))


def test_validation_has_no_quarantine(sick: Manifest) -> None:
    loader = EvaluationLoader(sick, Plain("plain"), DATA, BatchPlan(LANES), 0)
    with pytest.raises(DamagedError, match=r"/set/shard-00000\d\.tar: .*verify"):
        list(loader)


# What counts


def damage_of(manifest: Manifest, pair: int) -> Damage:
    with pytest.raises(DamagedError) as caught:
        ShardReader(manifest).sample(pair)
    return caught.value.damage


def test_a_group_is_damaged_as_a_whole_and_a_shard_too(sick: Manifest) -> None:
    groups = sick.index["pair_group"]
    for group in (3, 30):
        pairs = np.flatnonzero(groups == group).tolist()
        (found,) = {damage_of(sick, pair) for pair in pairs}
        offset = int(sick.index["group_offset"][group])
        assert (found.shard, found.group, found.offset, found.key, found.pairs) == (
            sick.shards[group // 8].name, group, offset, None, len(pairs)
        )  # fmt: skip
    (found,) = {damage_of(sick, pair) for pair in np.flatnonzero((groups >= 16) & (groups < 24)).tolist()}
    assert (found.shard, found.group, found.key, found.pairs) == (sick.shards[2].name, None, None, sick.shards[2].pairs)


def case(group: int | None, pairs: int, shard: str = "a.tar") -> Damage:
    return Damage(shard, group, None if group is None else 512 * group, None, pairs, "is torn")


def test_each_pair_is_counted_once(sound: Manifest) -> None:
    quarantine = Quarantine({"one": sound, "two": sound}, 0.5)
    assert [entry.lost for entry in quarantine.add(1, "one", [case(4, 3), case(2, 1), case(4, 3)])] == [1, 3]
    assert quarantine.add(2, "one", [case(2, 1)]) == []
    assert [entry.lost for entry in quarantine.add(3, "one", [case(5, 2), case(None, 10)])] == [6]
    assert quarantine.knows("one", case(7, 2))
    assert quarantine.add(4, "one", [case(7, 2), case(None, 10)]) == []
    assert not quarantine.knows("two", case(7, 2))
    assert quarantine.pairs == 10
    again = Quarantine({"one": sound, "two": sound}, 0.5)
    again.restore(json.loads(json.dumps(quarantine.state())))
    assert again.entries == quarantine.entries
    assert again.pairs == 10
    assert again.add(5, "one", [case(7, 2)]) == []
    assert again.add(5, "two", [case(7, 2)]) == [Entry(5, "two", case(7, 2), 2)]


def test_the_order_in_which_ranks_tell_does_not_matter(sound: Manifest) -> None:
    found = [case(9, 1, "b.tar"), case(3, 2), case(None, 8, "c.tar"), case(1, 1, "c.tar"), case(1, 4)]
    forwards, backwards = Quarantine({"one": sound}, 1.0), Quarantine({"one": sound}, 1.0)
    forwards.add(1, "one", found)
    backwards.add(1, "one", found[::-1])
    assert forwards.state() == backwards.state()
    assert forwards.pairs == 15


def test_the_budget_is_a_share_of_each_sets_pairs(sound: Manifest) -> None:
    quarantine = Quarantine({"one": sound, "two": sound}, 5 / sound.num_pairs)
    quarantine.add(1, "one", [case(1, 3), case(2, 2)])
    quarantine.add(1, "two", [case(1, 3), case(2, 2)])
    quarantine.check()
    quarantine.add(2, "two", [case(3, 1), case(5, 7)])
    with pytest.raises(DamageError) as caught:
        quarantine.check()
    assert str(caught.value) == (
        f"data set two: 13 of {sound.num_pairs} pairs cannot be read, more than data.damage_budget "
        f"{5 / sound.num_pairs} allows: {sound.folder}/a.tar: group 1 at byte 512 is torn (3 pairs); "
        f"{sound.folder}/a.tar: group 2 at byte 1024 is torn (2 pairs); "
        f"{sound.folder}/a.tar: group 3 at byte 1536 is torn (1 pairs); and 1 more in quarantine.jsonl; "
        f"`villa-ds shards verify {sound.folder}` names all there is: copy those shards again, start again"
    )
    assert caught.value.exit_code == 3
