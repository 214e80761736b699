"""The quarantine: what of a shard set cannot be read, counted once, the same on every rank, within a budget.

A group is sound or damaged as a whole, and so is a shard that cannot be opened: which pairs are lost follows from the
bytes and the index alone, whoever reads them first (docs/reliability.md).
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from villa_ds.data.manifest import Manifest
from villa_ds.errors import DamageError

MEND = "copy the shard again, `villa-ds shards verify` checks the whole set"
_SHOWN = 3  # cases that the line of a spent budget names


@dataclass(frozen=True, slots=True)
class Damage:
    """A group that cannot be used, or a whole shard."""

    shard: str  # file name
    group: int | None  # number in the set; None: the whole shard
    offset: int | None  # byte of the group's first header
    key: str | None  # of the tar sample; None where it cannot be read either
    pairs: int  # that are lost with it
    reason: str

    def __str__(self) -> str:
        named = "" if self.key is None else f" ({self.key})"
        where = "" if self.group is None else f" group {self.group} at byte {self.offset}{named}"
        return f"{self.shard}:{where} {self.reason}"


class DamagedError(DamageError):
    """Raised where damage is met; the loader of a training set turns it into an entry of the quarantine."""

    def __init__(self, damage: Damage, folder: str) -> None:
        super().__init__(damage, folder)
        self.damage = damage
        self._folder = folder

    def __str__(self) -> str:
        return f"{self._folder}/{self.damage}; {MEND}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A case in quarantine."""

    step: int  # optimizer step that met it first
    data: str  # data set, by its name in the recipe
    damage: Damage
    lost: int  # pairs that no earlier entry had counted

    def to_json(self) -> dict[str, Any]:
        """One flat mapping."""
        return {"step": self.step, "data": self.data, **dataclasses.asdict(self.damage), "lost": self.lost}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Entry":
        """The entry that `to_json` wrote."""
        damage = Damage(**{item.name: values[item.name] for item in dataclasses.fields(Damage)})
        return Entry(values["step"], values["data"], damage, values["lost"])

    def __str__(self) -> str:
        return f"data set {self.data}: {self.damage} ({self.lost} pairs)"


class Quarantine:
    """The damage that a run has met in its training sets.

    `budget` is the share of a set's pairs that may be lost. Every rank must `add` the same, in any order.
    """

    def __init__(self, sets: Mapping[str, Manifest], budget: float) -> None:
        self._sets, self._budget = sets, budget
        self.restore([])

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint: JSON."""
        return [entry.to_json() for entry in self.entries]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Go back to a checkpoint's `state`."""
        self.entries: list[Entry] = []
        self._known: set[tuple[str, str, int | None]] = set()
        self.pairs = 0  # lost so far, of all data sets
        for values in state:
            self._append(Entry.from_json(values))

    def knows(self, data: str, damage: Damage) -> bool:
        """Whether the case, or the whole shard that it is in, is counted already."""
        return not self._known.isdisjoint({(data, damage.shard, None), (data, damage.shard, damage.group)})

    def add(self, step: int, data: str, found: Iterable[Damage]) -> list[Entry]:
        """Count what is new of `found`; the new entries. `check` follows."""
        new = []
        for damage in sorted(set(found), key=_whole_shards_first):
            if not self.knows(data, damage):
                counted = [item.lost for item in self.entries if (item.data, item.damage.shard) == (data, damage.shard)]
                lost = damage.pairs - sum(counted) if damage.group is None else damage.pairs
                new.append(Entry(step, data, damage, lost))
                self._append(new[-1])
        return new

    def check(self) -> None:
        """DamageError, which names the first cases and the mend, if a data set has lost more than the budget."""
        for data, manifest in self._sets.items():
            entries = [entry for entry in self.entries if entry.data == data]
            lost = sum(entry.lost for entry in entries)
            if lost > self._budget * manifest.num_pairs:
                cases = _listed([f"{manifest.store}/{entry.damage} ({entry.lost} pairs)" for entry in entries])
                raise DamageError(
                    f"data set {data}: {lost} of {manifest.num_pairs} pairs cannot be read, more than "
                    f"data.damage_budget {self._budget} allows: {cases}; `villa-ds shards verify {manifest.store}` "
                    "names all there is: copy those shards again, start again"
                )

    def _append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._known.add((entry.data, entry.damage.shard, entry.damage.group))
        self.pairs += entry.lost


def _whole_shards_first(damage: Damage) -> tuple[str, int, str]:
    return damage.shard, -1 if damage.group is None else damage.group, damage.reason


def _listed(cases: Sequence[str]) -> str:
    rest = len(cases) - _SHOWN
    return "; ".join(cases[:_SHOWN]) + (f"; and {rest} more in quarantine.jsonl" if rest > 0 else "")
