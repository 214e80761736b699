"""What the demo benchmark's tasks score without a look at the image, printed as a Markdown table.

    python benchmarks/demo_baselines.py SHARDS

SHARDS is the folder of `villa-ds shards demo SHARDS --benchmark`. "Majority" always says the training set's commonest
target. "Text only" says what most often goes with the very same text in the training set (with texts from templates a
stronger reader of them has little more to go by), the majority where the text is new. For multiple choice both go by
the texts of the choices, for referring expressions by the place among the image's regions.
"""

import argparse
import collections
import json
import tarfile
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

from villa_ds.data.manifest import load_manifest


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """JSON of each group of a set."""
    for shard in load_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    yield json.load(archive.extractfile(member))  # type: ignore[arg-type]


def cases(folder: Path) -> Iterator[tuple[Hashable, Hashable]]:
    """(text, target) of a task with one target of few values."""
    for record in records(folder):
        for text in record["texts"]:
            target = text["target"]
            yield text["text"], target["labels"][0] if "labels" in target else target.get("label", target.get("region"))


def by_text(shards: Path, task: str) -> tuple[float, float]:
    """Accuracy of the majority and of the text alone on the test set."""
    overall: collections.Counter[Hashable] = collections.Counter()
    counts: Mapping[Hashable, collections.Counter[Hashable]] = collections.defaultdict(collections.Counter)
    for text, target in cases(shards / task / "train"):
        overall[target] += 1
        counts[text][target] += 1
    majority = overall.most_common(1)[0][0]
    test = list(cases(shards / task / "test"))
    said = [counts[text].most_common(1)[0][0] if text in counts else majority for text, _ in test]
    hits = [answer == target for answer, (_, target) in zip(said, test, strict=True)]
    return sum(target == majority for _, target in test) / len(test), sum(hits) / len(test)


def by_choice(shards: Path, name: str) -> tuple[float, float]:
    """The same for the four choices `name`s: the commonest place, and the choice most often right in training."""
    right: collections.Counter[Hashable] = collections.Counter()
    shown: collections.Counter[Hashable] = collections.Counter()
    places: collections.Counter[int] = collections.Counter()
    for record in records(shards / "vcr" / "train"):
        for text in record["texts"]:
            target = text["target"]
            places[target[name]] += 1
            for place, choice in enumerate(target[f"{name}s"]):
                shown[tuple(choice)] += 1
                right[tuple(choice)] += place == target[name]
    best = places.most_common(1)[0][0]
    hits = []
    for record in records(shards / "vcr" / "test"):
        for text in record["texts"]:
            target = text["target"]
            chances = [right[tuple(choice)] / max(shown[tuple(choice)], 1) for choice in target[f"{name}s"]]
            hits.append((target[name] == best, target[name] == chances.index(max(chances))))
    return sum(hit for hit, _ in hits) / len(hits), sum(hit for _, hit in hits) / len(hits)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    shards: Path = parser.parse_args().shards
    rows = {task: by_text(shards, task) for task in ("scenes-vqa", "ve", "nlvr2", "re")}
    rows |= {f"vcr, {name}": by_choice(shards, name) for name in ("answer", "rationale")}
    rows["retrieval"] = (1 / 3, 1 / 3)  # a pair above two others by chance
    print("| task | majority | text only |\n|---|---|---|")
    for task, (majority, text) in rows.items():
        print(f"| {task} | {majority:.3f} | {text:.3f} |")


if __name__ == "__main__":
    main()
