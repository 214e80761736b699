"""UNITER's data bases made up at random, every kind and flavour: what is converted is what was put in, to the bit.

The truth is what the generator drew, halved and cut by numpy here; nothing is read back but the shards.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from tests.features import LENIENT, META, PIECES, Fields, log, packed, samples, write_text_base
from villa_ds.data.convert.account import Account
from villa_ds.data.convert.texts import UNITER, TextsFile
from villa_ds.data.convert.uniter_lmdb import from_uniter_lmdb

KINDS = ("caption", "retrieval", "vqa", "entailment", "nlvr2", "vcr", "re_gt", "re_det")
ODD_NAMES = ("a b", "ünïcode", "図", "x.y.jpg", "sub/dir/file", "a--b", "-", "n" * 120, "e\u0301", "\U0001f600")
WIDTH = 5


@dataclass
class Stored:
    """An image data base: its folder, its arrays as they were before they were halved, how many rows are taken."""

    folder: Path
    images: dict[str, Fields]  # by name without .npz
    taken: dict[str, int]

    def expected(self, name: str) -> tuple[Any, Any, Any]:
        rows = slice(self.taken[name])
        half = {field: array[rows].astype(np.float16) for field, array in self.images[name].items()}
        boxes = half["norm_bb"].astype(np.float32)
        area = boxes[:, 4:5] * boxes[:, 5:6]
        return half["features"], np.concatenate([boxes, area], axis=1), half["soft_labels"]


@dataclass
class Drawn:
    """A text data base and what must become of its texts."""

    folder: Path
    texts: dict[str, tuple[tuple[str, ...], list[int], dict[str, Any]]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def regions(rng: np.random.Generator, classes: int) -> Fields:
    """Boxes up to the very border, distributions from flat to sharp."""
    count = int(rng.integers(1, 14))
    corners = np.sort(rng.random((count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
    near_border = rng.random(count) < 0.3
    corners[near_border, 2:] = 1 - rng.choice([0, 1e-4, 3e-4], (near_border.sum(), 2))
    scores = rng.normal(size=(count, classes)) * rng.choice([0, 1, 10], (count, 1))
    soft = np.exp(scores - scores.max(axis=1, keepdims=True))
    return {
        "features": (rng.normal(size=(count, WIDTH)) * 10.0 ** rng.integers(-6, 4)).astype(np.float32),
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
        "conf": np.sort(rng.random(count).astype(np.float32))[::-1],
        "soft_labels": (soft / soft.sum(axis=1, keepdims=True)).astype(np.float32),
    }


def zipped(content: Fields, rng: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    stray = {"allow_pickle": np.array(False)} if rng.random() < 0.5 else {}
    half = {name: array.astype(np.float16) for name, array in content.items()}
    np.savez_compressed(stream, **half, **stray)  # type: ignore[arg-type]
    return stream.getvalue()


def draw_images(rng: np.random.Generator, root: Path, names: list[str], classes: int, flavour: str) -> Stored:
    """`flavour`: "threshold", "fixed" or "all"; each compressed or not."""
    images = {name: regions(rng, classes) for name in names}
    taken, counts = {}, {}
    threshold = float(rng.choice([0.2, 0.15, 0.05, 1e-05]))
    low, high, fixed = int(rng.integers(1, 8)), int(rng.integers(8, 12)), int(rng.integers(1, 12))
    for name, content in images.items():
        count = len(content["features"])
        if flavour == "threshold":
            counts[f"{name}.npz"] = min(max(int((content["conf"] > threshold).sum()), low), high)
            count = min(count, counts[f"{name}.npz"])
        elif flavour == "fixed":
            count = min(count, fixed)
        taken[name] = count
    compressed = bool(rng.random() < 0.5)
    kind = {"threshold": f"feat_th{threshold}_max{high}_min{low}", "fixed": f"feat_numbb{fixed}", "all": "all"}[flavour]
    folder = root / (kind + ("_compressed" if compressed else ""))
    folder.mkdir(parents=True)
    if flavour == "threshold":
        text = f"{threshold:.6f}" if rng.random() < 0.2 else str(threshold)  # another way to write the same number
        (root / f"nbb_th{text}_max{high}_min{low}.json").write_text(
            json.dumps(counts, ensure_ascii=bool(rng.random() < 0.5))
        )
    # The release cuts when it writes; a data base whose rows go on is cut when it is read.
    cut = taken if rng.random() < 0.7 else dict.fromkeys(names, 99)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as writer:
        for name, content in images.items():
            part = {field: array[: cut[name]] for field, array in content.items()}
            writer.put(f"{name}.npz".encode(), zipped(part, rng) if compressed else packed(part))
        if rng.random() < 0.8:
            writer.put(b"__keys__", json.dumps([f"{name}.npz" for name in names]).encode())
    if rng.random() < 0.5:
        (folder / "lock.mdb").unlink()
    return Stored(folder, images, taken)


def draw_text(rng: np.random.Generator, kind: str, record: dict[str, Any], stored: list[Stored]) -> dict[str, Any]:
    """Adds to the record what its kind has; returns the target that it must become."""
    if kind in ("vqa", "entailment"):
        answers = sorted(rng.choice(9, int(rng.integers(0, 4)), replace=False).tolist())
        scores = rng.choice([0.3, 0.6, 0.9, 1.0], len(answers)).tolist()
        if rng.random() < 0.2:
            record["target"] = None
            return {}
        record["target"] = {"labels": answers, "scores": scores}
        return {"labels": answers, "scores": scores}
    if kind == "nlvr2":
        record["target"] = [None, 0, 1][rng.integers(3)]
        record |= {"identifier": "dev-1-0-0", "sentence": "Both are.", "label": "True"}
        return {} if record["target"] is None else {"label": record["target"]}
    if kind == "vcr":
        choices = {name: [pieces(rng) for _ in range(4)] for name in ("answers", "rationales")}
        labels = {name: int(rng.integers(-1, 4)) for name in choices}
        record |= {"input_ids_as": choices["answers"], "input_ids_rs": choices["rationales"]}
        record |= {"qa_target": labels["answers"], "qar_target": labels["rationales"]}
        return {**choices, **{name[:-1]: label for name, label in labels.items() if label >= 0}}
    return {}


def pieces(rng: np.random.Generator) -> list[int]:
    return rng.integers(5, len(PIECES), int(rng.integers(1, 12))).tolist()


def draw_texts(rng: np.random.Generator, folder: Path, kind: str, stored: list[Stored]) -> Drawn:
    """Some of the images, some of them several times; some texts that must be rejected."""
    drawn, records = Drawn(folder), {}
    for number in range(int(rng.integers(3, 30))):
        identifier = f"{number}" if rng.random() < 0.8 else f"t {number} é图"
        pick = [str(rng.choice(list(base.images))) for base in stored]
        if kind == "nlvr2":
            pick = [str(name) for name in rng.choice(list(stored[0].images), 2, replace=False)]
        record: dict[str, Any] = {"input_ids": pieces(rng), "img_fname": [f"{name}.npz" for name in pick]}
        target = draw_text(rng, kind, record, stored)
        trouble = rng.random()
        if trouble < 0.08:
            record["input_ids"] = []
            drawn.rejected[identifier] = "against the contract"
        elif trouble < 0.16:
            record["img_fname"][0] = "not there.npz"
            drawn.rejected[identifier] = "of an image that is missing"
        else:
            drawn.texts[identifier] = (tuple(pick), record["input_ids"], target)
        if len(pick) == 1:
            record["img_fname"] = record["img_fname"][0]
        records[identifier] = record
    lengths = {identifier: len(record["input_ids"]) for identifier, record in records.items()}
    files: dict[str, Any] = {"id2len": lengths}
    if kind == "vcr":
        files = {"id2len": None, "id2len_qa": lengths, "id2len_qar": lengths}
        if rng.random() < 0.5:
            files["txt2img"] = None
    if kind == "retrieval":
        files["img2txts"] = images_of(records)
    write_text_base(folder, records, **files)
    return drawn


def images_of(records: Mapping[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for identifier, record in records.items():
        found.setdefault(record["img_fname"], []).append(identifier)
    return found


def draw_expressions(rng: np.random.Generator, folder: Path, stored: Stored, detected: bool) -> Drawn:
    """Referring expressions: the place of the annotation among the image's, sentences named by numbers."""
    drawn, records, refs, pictures = Drawn(folder), {}, [], []
    for name, content in stored.images.items():
        image = int(name[-12:])
        annotations = (1000 * image + rng.permutation(len(content["features"]))).tolist()
        pictures.append({"id": image, "ann_ids": annotations, "width": 640, "height": 480, "file_name": "x.jpg"})
        for _ in range(int(rng.integers(1, 3))):
            place = int(rng.integers(len(annotations)))
            box = rng.uniform(1, 200, 4).tolist()
            sentences = []
            for _ in range(int(rng.integers(1, 3))):
                identifier = str(len(records))
                sentences.append(len(records))
                records[identifier] = {
                    "sent_id": len(records),
                    "sent": "the left one",
                    "ref_id": len(refs),
                    "image_id": image,
                    "ann_id": annotations[place],
                    "bbox": box,
                    "input_ids": pieces(rng),
                    "img_fname": f"visual_grounding_coco_gt_{image:012d}.npz",
                }
                target: dict[str, Any] = {"box": box, "image_size": [640, 480]}
                if not detected:
                    target["region"] = place
                    if place >= stored.taken[name]:
                        drawn.rejected[identifier] = "against the contract"
                        continue
                drawn.texts[identifier] = ((name,), records[identifier]["input_ids"], target)
            refs.append({"ref_id": len(refs), "ann_id": annotations[place], "image_id": image, "sent_ids": sentences})
    more = {} if rng.random() < 0.5 else {"id2len": None}
    write_text_base(folder, records, refs=refs, images=pictures, annotations=[], categories=[], txt2img=None, **more)
    return drawn


def check(out: Path, account: Account, drawn: Drawn, stored: list[Stored]) -> None:
    """Every id, feature, box, label, word piece and target; and the account."""
    found = samples(out)
    assert set(found) == set(drawn.texts)
    for identifier, (names, word_pieces, target) in drawn.texts.items():
        sample = found[identifier]
        assert sample.word_pieces.tolist() == word_pieces
        assert sample.target == target
        assert [span.name for span in sample.regions.images] == list(names)
        sources = stored if len(stored) > 1 else stored * len(names)
        expected = [base.expected(name) for base, name in zip(sources, names, strict=True)]
        for place, actual in enumerate((sample.regions.features, sample.regions.boxes, sample.regions.labels)):
            assert actual is not None
            np.testing.assert_array_equal(actual, np.concatenate([parts[place] for parts in expected]))
            assert actual.dtype == expected[0][place].dtype
    used = {(place, name) for names, _, _ in drawn.texts.values() for place, name in enumerate(names)}
    if len(stored) == 1:
        used = {(0, name) for _, name in used}
    assert (account.texts.read, account.texts.written) == (len(drawn.texts) + len(drawn.rejected), len(drawn.texts))
    assert account.images.read == sum(len(base.images) for base in stored)
    assert account.images.written == len(used)
    if drawn.rejected:
        logged = dict(log(out))
        assert {identifier: logged[identifier] for identifier in drawn.rejected} == drawn.rejected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavour", ["threshold", "fixed", "all"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_data_bases(tmp_path: Path, kind: str, flavour: str, seed: int) -> None:
    rng = np.random.default_rng([seed, KINDS.index(kind), len(flavour)])
    classes = int(rng.choice([3, 1601]))
    count = int(rng.integers(4, 12))
    if kind.startswith("re_"):
        middle = "coco_gt" if kind == "re_gt" else "det_coco"
        names = [f"visual_grounding_{middle}_{number:012d}" for number in range(1, count)]
        stored = [draw_images(rng, tmp_path / "img", names, classes, flavour)]
        drawn = draw_expressions(rng, tmp_path / "t.db", stored[0], detected=kind == "re_det")
    else:
        odd = rng.permutation(ODD_NAMES)[: count // 2].tolist()
        names = [f"coco_{number:06d}" for number in range(count)] + odd
        stored = [draw_images(rng, tmp_path / "img", names, classes, flavour)]
        if kind == "vcr":
            stored.insert(0, draw_images(rng, tmp_path / "img_gt", [f"gt_{name}" for name in names], classes, "fixed"))
        drawn = draw_texts(rng, tmp_path / "t.db", kind, stored)
    given = [str(base.folder) for base in stored]
    account = from_uniter_lmdb(tmp_path / "out", ";".join(reversed(given)), TextsFile(drawn.folder, UNITER), LENIENT)
    check(tmp_path / "out", account, drawn, stored)


@pytest.mark.slow
def test_thousands_of_entries(tmp_path: Path) -> None:
    """Also that texts of one image are one group, in the order of the ids."""
    rng = np.random.default_rng(0)
    names = [f"i{number}" for number in range(2000)]
    stored = draw_images(rng, tmp_path / "img", names, 3, "threshold")
    records = {
        str(number): {"input_ids": pieces(rng), "img_fname": f"i{number * 7 % 1999}.npz", "target": None}
        for number in range(5000)
    }
    write_text_base(tmp_path / "t.db", records, size=1 << 26)
    account = from_uniter_lmdb(tmp_path / "out", str(stored.folder), TextsFile(tmp_path / "t.db", UNITER), LENIENT)
    texts = {name: ((text["img_fname"][:-4],), text["input_ids"], {}) for name, text in records.items()}
    check(tmp_path / "out", account, Drawn(tmp_path / "t.db", texts), [stored])


def test_two_sources_with_the_same_names(tmp_path: Path) -> None:
    """Annotated and detected boxes of one image may have one name; in the set they are two images."""
    rng = np.random.default_rng(0)
    truth = draw_images(rng, tmp_path / "vcr_gt", ["a", "b"], 3, "fixed")
    found = draw_images(rng, tmp_path / "vcr", ["a", "b"], 3, "threshold")
    write_text_base(tmp_path / "t.db", {"t": {"input_ids": [6], "img_fname": ["a.npz", "a.npz"]}}, meta=META)
    from_uniter_lmdb(tmp_path / "out", f"{found.folder};{truth.folder}", TextsFile(tmp_path / "t.db", UNITER), LENIENT)
    regions = samples(tmp_path / "out")["t"].regions
    assert [span.name for span in regions.images] == ["a", f"vcr/{found.folder.name}/a"]
    np.testing.assert_array_equal(regions.features, np.concatenate([truth.expected("a")[0], found.expected("a")[0]]))
