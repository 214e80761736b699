"""Converted data bases against what the original readers make of them (tests/golden/FACTS.md, section 9).

Every folder of the golden root that holds an `img_db` and a `txt_db` is a case: `expected.json` and `expected.npz` are
the original's output, `npz` the region files that the image data bases were made of.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.parity.golden import ROOT
from villa_ds.batch import Regions, Sample
from villa_ds.cli import main
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.verify import verify

DETECTOR_FIELDS = {"features", "norm_bb", "pos7", "soft_labels"}  # what a shard set keeps; `conf` it does not


@dataclass(frozen=True)
class Golden:
    """One folder of data bases."""

    folder: Path

    @cached_property
    def expected(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        return content

    @cached_property
    def arrays(self) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / "expected.npz") as stored:
            return {name: stored[name] for name in stored.files}

    @property
    def vocabulary(self) -> Path:
        (path,) = self.folder.glob("*/vocab.txt")
        return path

    def lengths(self, texts: Path) -> dict[str, int]:
        """Ids of a text data base in order, with the original's count of word pieces."""
        name = "id2len.json" if (texts / "id2len.json").exists() else "id2len_qa.json"
        lengths: dict[str, int] = json.loads((texts / name).read_text())
        return lengths

    def text_base(self, identifier: str) -> Path:
        """The text data base that holds this id."""
        (found,) = (base for base in sorted(self.folder.glob("txt_db/*.db")) if identifier in self.lengths(base))
        return found


GOLDEN = [Golden(path.parent) for path in sorted(ROOT.glob("*/img_db")) if (path.parent / "txt_db").is_dir()]


@dataclass(frozen=True)
class Converted:
    """A converted pair of data bases."""

    manifest: Manifest
    samples: dict[str, Sample]  # by text id

    @property
    def images(self) -> dict[str, Regions]:
        """Regions of each image by the name that the data base has for it."""
        return {
            f"{span.name}.npz": rows(sample.regions, span.start, span.stop)
            for sample in self.samples.values()
            for span in sample.regions.images
        }


def rows(regions: Regions, start: int, stop: int) -> Regions:
    labels = None if regions.labels is None else regions.labels[start:stop]
    return Regions(regions.features[start:stop], regions.boxes[start:stop], labels, ())


def convert(golden: Golden, out: Path, images: str, texts: Path) -> Converted:
    command = ["shards", "from-uniter-lmdb", "--images", images, "--texts", str(texts)]
    assert main([*command, "--vocabulary", str(golden.vocabulary), str(out)]) == 0
    assert not verify(out).problems
    manifest = load_manifest(out)
    reader = ShardReader(manifest)
    samples = [reader.sample(pair) for pair in range(manifest.num_pairs)]
    return Converted(manifest, {sample.id: sample for sample in samples})


def stored_names(base: Path) -> set[str]:
    """Images that a text data base names."""
    path = base / "txt2img.json"
    if not path.exists():
        return {
            f"visual_grounding_coco_gt_{item['id']:012d}.npz" for item in json.loads((base / "images.json").read_text())
        }
    return {
        name
        for names in json.loads(path.read_text()).values()
        for name in ([names] if isinstance(names, str) else names)
    }


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda golden: golden.folder.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    case: Golden = request.param
    return case


@pytest.fixture(scope="module")
def flavours(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Converted]:
    """Every flavour of the image data base, converted with the text data base that names most of its images."""
    found = {}
    for name, flavour in golden.expected["img_db"].items():
        directory = golden.folder / flavour["directory"]
        held = set(json.loads(json.dumps(golden.expected["img_db"]["threshold"]["__keys___sorted"])))
        bases = [base for base in sorted(golden.folder.glob("txt_db/*.db")) if stored_names(base) <= held]
        bases.sort(key=lambda base: (len(stored_names(base)), (base / "id2len.json").exists()))
        found[name] = convert(golden, tmp_path_factory.mktemp("set") / name, str(directory), bases[-1])
    return found


def test_there_is_something_to_compare() -> None:
    assert GOLDEN


def test_every_image_of_every_flavour(golden: Golden, flavours: dict[str, Converted]) -> None:
    """Numbers of regions, and the bytes, are those of the source files, cut and rounded as the original does."""
    for name, flavour in golden.expected["img_db"].items():
        images = flavours[name].images
        sources = {
            path.name: path for path in (golden.folder / "npz" / Path(flavour["directory"]).parent.name).iterdir()
        }
        assert sorted(images) == sorted(flavour.get("__keys___sorted", sources))
        counts = flavour.get("n_boxes_returned")
        for image, regions in images.items():
            count = None if counts is None else counts[image]
            assert count is None or len(regions.features) == count
            with np.load(sources[image]) as stored:
                assert count is not None or len(regions.features) == len(stored["features"])
                np.testing.assert_array_equal(regions.features, stored["features"][:count].astype(np.float16))
                np.testing.assert_array_equal(regions.boxes[:, :6], stored["norm_bb"][:count].astype(np.float16))
                np.testing.assert_array_equal(regions.labels, stored["soft_labels"][:count].astype(np.float16))


def test_the_arrays_of_the_original_readers(golden: Golden, flavours: dict[str, Converted]) -> None:
    compared = 0
    for name, expected in golden.arrays.items():
        flavour, _, rest = name.partition("/")
        if flavour not in flavours:
            continue  # of a data set's item, below
        image, _, field = rest.partition("/")
        if field not in DETECTOR_FIELDS:
            continue
        regions = flavours[flavour].images[image]
        actual = {
            "features": regions.features,
            "norm_bb": regions.boxes[:, :6],
            "pos7": regions.boxes,
            "soft_labels": regions.labels,
        }[field]
        np.testing.assert_array_equal(actual, expected, err_msg=name)
        compared += 1
    assert compared


def test_texts(golden: Golden, tmp_path: Path) -> None:
    """Every id of every text data base, in order; word pieces and targets of the records that the original decoded."""
    vocabulary = golden.expected["img_db"]
    for kind, expected in golden.expected["txt_db"].items():
        records = expected.get("records") or {str(expected["record"]["sent_id"]): expected["record"]}
        base = golden.text_base(next(iter(records)))
        directory = golden.folder / vocabulary["threshold"]["directory"]
        if kind == "re":
            (directory,) = (path.parent for path in golden.folder.glob("img_db/*gt*/*/data.mdb"))
        converted = convert(golden, tmp_path / kind, str(directory), base)
        lengths = golden.lengths(base)
        assert {name: len(sample.word_pieces) for name, sample in converted.samples.items()} == lengths
        assert len(lengths) == expected.get("n", len(expected.get("ids_order", lengths)))
        for name, record in records.items():
            sample = converted.samples[name]
            assert sample.word_pieces.tolist() == record["input_ids"]
            files = record["img_fname"] if isinstance(record["img_fname"], list) else [record["img_fname"]]
            assert [f"{span.name}.npz" for span in sample.regions.images] == files
            if kind == "re":
                (place,) = (item["ann_ids"] for item in expected["images"] if item["id"] == record["image_id"])
                assert sample.target["region"] == place.index(record["ann_id"])
                assert sample.target["box"] == record["bbox"]
            else:
                target = record["target"]
                assert sample.target == ({"label": target} if isinstance(target, int) else target)


def test_items_of_the_original_data_sets(golden: Golden, flavours: dict[str, Converted], tmp_path: Path) -> None:
    """Targets, regions and boxes as the original's data sets return them."""
    items = golden.expected["datasets"]
    threshold = str(golden.folder / golden.expected["img_db"]["threshold"]["directory"])
    fixed = str(golden.folder / golden.expected["img_db"]["fixed"]["directory"])
    seen = set()
    for name, item in items.items():
        kind = name.partition("[")[0]
        if not isinstance(item, dict) or kind not in (
            "nlvr2_paired",
            "vqa",
            "mrc",
            "vcr_train_qa",
            "vcr_train_qar",
            "re",
        ):
            continue
        base = golden.text_base(item["id"])
        images = {"re": "", "vcr_train_qa": f"{fixed};{threshold}", "vcr_train_qar": f"{fixed};{threshold}"}
        chosen = images.get(kind, threshold)
        if kind == "re":
            (chosen,) = (str(path.parent) for path in golden.folder.glob("img_db/*gt*/*/data.mdb"))
        sample = convert(golden, tmp_path / name, chosen, base).samples[item["id"]]
        regions, target = sample.regions, sample.target
        if kind == "nlvr2_paired":
            assert [span.stop - span.start for span in regions.images] == item["n_boxes"]
            assert target == {"label": item["target"]}
            triplet = name.replace("paired", "triplet")
            np.testing.assert_array_equal(regions.features, golden.arrays[f"{triplet}/img_feat"])
            np.testing.assert_array_equal(regions.boxes, golden.arrays[f"{triplet}/img_pos_feat"])
        elif kind == "vqa":
            scores = np.zeros(len(item["target"]), np.float32)
            scores[target["labels"]] = target["scores"]
            np.testing.assert_array_equal(scores, np.array(item["target"], np.float32))
            np.testing.assert_array_equal(regions.boxes, golden.arrays[f"{name}/img_pos_feat"])
        elif kind == "mrc":
            np.testing.assert_array_equal(regions.labels, golden.arrays[f"{name}/soft_labels"])
        elif kind == "re":
            assert len(regions.features) == item["n_boxes"]
            assert [target["region"]] == item["target"]
        else:
            record = item["record"]
            assert sample.word_pieces.tolist() == record["input_ids"]
            assert target["answers"] == record["input_ids_as"]
            assert target["rationales"] == record["input_ids_rs"]
            assert (target["answer"], target["rationale"]) == (record["qa_target"], record["qar_target"])
            assert len(regions.features) == item["n_boxes"][0]
        seen.add(kind)
    assert len(seen) == 6


def test_region_files_by_the_original_selection(golden: Golden, tmp_path: Path) -> None:
    """From the source files, `--confidence` keeps the regions that the original's data bases have."""
    said, flavour = golden.expected["parameters"], golden.expected["img_db"]["threshold"]
    source = golden.folder / "npz" / Path(flavour["directory"]).parent.name
    texts = tmp_path / "texts.jsonl"
    names = [path.stem for path in sorted(source.iterdir())]
    texts.write_text("".join(json.dumps({"image": name, "id": name, "text": "the"}) + "\n" for name in names))
    command = ["shards", "from-npz", "--features", str(source), "--texts", str(texts)]
    limits = ["--confidence", said["conf_th"], "--min-boxes", said["min_bb"], "--max-boxes", said["max_bb"]]
    out = tmp_path / "out"
    assert main([*command, *map(str, limits), "--vocabulary", str(golden.vocabulary), str(out)]) == 0
    manifest = load_manifest(out)
    counts = dict(zip(names, manifest.index["group_regions"].tolist(), strict=True))
    assert {f"{name}.npz": count for name, count in counts.items()} == flavour["n_boxes_returned"]
