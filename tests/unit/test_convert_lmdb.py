"""UNITER's data bases, made up: targets, which one is which, and what is wrong with one (values: tests/parity)."""

import json
import os
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.features import (
    LENIENT,
    META,
    PIECES,
    SETTINGS,
    fields,
    log,
    packed,
    record,
    samples,
    write_lmdb,
    write_text_base,
)
from villa_ds.data.convert.account import IncompleteError
from villa_ds.data.convert.settings import Settings, read_answers, with_extra
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.convert.to_npz import to_npz
from villa_ds.data.convert.uniter_lmdb import from_uniter_lmdb
from villa_ds.data.manifest import MANIFEST_NAME, load_manifest
from villa_ds.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A thresholded data base of the images a, b and c, of 3 regions each."""
    values = {f"{name}.npz": packed(fields(seed)) for seed, name in enumerate("abc")}
    (tmp_path / "img" / "nbb_th0.2_max9_min1.json").parent.mkdir()
    (tmp_path / "img" / "nbb_th0.2_max9_min1.json").write_text(json.dumps(dict.fromkeys(values, 3)))
    return write_lmdb(
        tmp_path / "img" / "feat_th0.2_max9_min1", {**values, "__keys__": json.dumps(list(values)).encode()}
    )


def test_targets_of_data_bases(tmp_path: Path, images: Path) -> None:
    texts = write_text_base(
        tmp_path / "t.db",
        {
            "caption": record("a.npz"),
            "test": record("a.npz", target=None),
            "entailment": record("a.npz", target={"labels": [1], "scores": [1.0]}, toked_question=["So", "it", "is."]),
            "pair": record(["b.npz", "c.npz"], target=1, sentence="Both."),
            "hidden": record("c.npz", input_ids_as=[[6]] * 4, input_ids_rs=[[7]] * 4, qa_target=-1, qar_target=-1),
        },
        img2txts={"a.npz": ["caption", "test", "entailment"]},
    )
    account = from_uniter_lmdb(tmp_path / "out", str(images.parent), TextsFile(texts, "uniter"), SETTINGS)
    assert account.rejected == 0
    found = samples(tmp_path / "out")
    assert {name: sample.target for name, sample in found.items()} == {
        "caption": {},
        "test": {},
        "entailment": {"labels": [1], "scores": [1.0]},
        "pair": {"label": 1},
        "hidden": {"answers": [[6]] * 4, "rationales": [[7]] * 4},
    }
    assert to_npz(tmp_path / "out", tmp_path / "files") == 3
    written = [json.loads(line) for line in (tmp_path / "files" / "texts.jsonl").read_text().splitlines()]
    assert {item["id"]: item["text"] for item in written} == {
        "caption": "word0 word1",
        "test": "word0 word1",
        "entailment": "So it is.",
        "pair": "Both.",
        "hidden": "word0 word1",
    }


def test_referring_expressions_on_detections(tmp_path: Path) -> None:
    """Names and targets follow the image data base: ground-truth boxes have a region, detections only the box."""
    expression = record("visual_grounding_coco_gt_000000000007.npz", image_id=7, ann_id=31, bbox=[1.5, 2.0, 3.0, 4.0])
    lists = {
        "refs": [{"sent_ids": [1]}],
        "images": [{"id": 7, "ann_ids": [30, 31], "width": 10, "height": 20}],
        "txt2img": None,
    }
    texts = write_text_base(tmp_path / "re.db", {"1": expression}, **lists)
    expected = {"box": [1.5, 2.0, 3.0, 4.0], "image_size": [10, 20]}
    for kind, target in (("coco_gt", {**expected, "region": 1}), ("det_coco", expected)):
        name = f"visual_grounding_{kind}_000000000007"
        base = write_lmdb(tmp_path / kind / "feat_numbb2", {f"{name}.npz": packed(fields(1))})
        from_uniter_lmdb(tmp_path / f"out-{kind}", str(base), TextsFile(texts, "uniter"), SETTINGS)
        sample = samples(tmp_path / f"out-{kind}")["1"]
        assert sample.target == target
        assert [(span.name, span.stop) for span in sample.regions.images] == [(name, 2)]


def test_bad_records_of_data_bases(tmp_path: Path, images: Path) -> None:
    base = tmp_path / "bad" / "all"
    torn = packed(fields(1))[:-3]
    object_array = msgpack.packb(
        {"features": {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": [1], b"data": b"x"}}
    )
    write_lmdb(
        base,
        {
            "a.npz": packed(fields(1)),
            "torn.npz": torn,
            "object.npz": object_array,
            "zip.npz": b"PK\x03\x04 and no more",
            "list.npz": msgpack.packb([1]),
            "__keys__": json.dumps(["a.npz", "gone.npz"]).encode(),
        },
    )
    names = ("torn", "object", "zip", "list", "gone")
    texts = write_text_base(
        tmp_path / "t.db",
        {
            "good": record("a.npz"),
            **{f"of-{name}": record(f"{name}.npz") for name in names},
            "moved": record("a.npz"),
            "long": record("a.npz"),
            "target": record("a.npz", target="yes"),
            "foreign": record("a.npz", input_ids=[64]),
            "choice": record("a.npz", input_ids_as=[[64]], input_ids_rs=[[6]], qa_target=0, qar_target=0),
            "pieceless": record("a.npz", input_ids=[]),
            "torn-text": b"\x00",
            "stray": record("a.npz"),
        },
        id2len={
            **dict.fromkeys(("good", *(f"of-{name}" for name in names), "moved", "target", "choice"), 2),
            "long": 3,
            "foreign": 1,
            "pieceless": 0,
            "torn-text": 2,
            "unwritten": 2,
        },
        txt2img={
            **dict.fromkeys(("good", "long", "target", "foreign", "choice", "pieceless", "unwritten"), "a.npz"),
            "moved": "list.npz",
            **{f"of-{name}": f"{name}.npz" for name in names},
        },
    )
    account = from_uniter_lmdb(tmp_path / "out", str(base), TextsFile(texts, "uniter"), LENIENT)
    assert list(samples(tmp_path / "out")) == ["good"]
    assert (account.texts.read, account.texts.written) == (15, 1)
    assert (account.images.read, account.images.written, account.images.rejected.total()) == (6, 1, 5)
    reasons = dict(log(tmp_path / "out"))
    assert reasons == {
        **dict.fromkeys((f"of-{name}" for name in names), "of an image that is rejected"),
        **dict.fromkeys(("moved", "long"), "of which the data base's files say different things"),
        **dict.fromkeys(("target", "torn-text", "torn", "object", "zip", "list"), "unreadable"),
        **dict.fromkeys(("foreign", "choice", "pieceless"), "against the contract"),
        **dict.fromkeys(("unwritten", "gone"), "without a record"),
        "stray": "not listed, or listed in one place only",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": {**META, "MASK": 5}}, "MASK is 5, but 4 in the vocabulary; give the vocab.txt of the tokenizer tiny"),
        ({"meta": {**META, "v_range": [5, 99]}}, "v_range is"),
        ({"meta": {"toker": "other"}}, "UNK is None, but 1"),
        ({"id2len": None}, "no id2len.json"),
        ({"img2txts": {"b.npz": ["t"]}}, "img2txts.json gives the text 't' to 'b.npz', txt2img.json to 'a.npz'"),
        ({"txt2img": []}, "expected a JSON object"),
        ({"refs": [{}]}, "refs.json: an entry lacks"),
        ({"images": [{"id": 1}]}, "images.json: an entry lacks"),
    ],
)
def test_data_bases_that_do_not_fit(tmp_path: Path, images: Path, change: dict[str, Any], message: str) -> None:
    texts = write_text_base(tmp_path / "t.db", {"t": record("a.npz")}, **change)
    with pytest.raises(DataError, match="(?s).*" + message.replace("[", r"\[")):
        from_uniter_lmdb(tmp_path / "out", str(images), TextsFile(texts, "uniter"), LENIENT)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_which_image_data_base(tmp_path: Path, images: Path) -> None:
    texts = write_text_base(tmp_path / "t.db", {"t": record("a.npz")})
    write_lmdb(images.parent / "all", {"a.npz": packed(fields(1))})
    with pytest.raises(DataError, match=r"there are in it: all, feat_th0.2_max9_min1"):
        from_uniter_lmdb(tmp_path / "out", str(images.parent), TextsFile(texts, "uniter"), SETTINGS)
    (images.parent / "nbb_th0.2_max9_min1.json").write_text('{"b.npz": 2}')
    with pytest.raises(DataError, match="a: is not in the nbb file"):
        from_uniter_lmdb(tmp_path / "out", str(images), TextsFile(texts, "uniter"), SETTINGS)
    with pytest.raises(DataError, match="there are in it: none"):
        from_uniter_lmdb(tmp_path / "out", str(tmp_path / "out"), TextsFile(texts, "uniter"), SETTINGS)


def test_a_truncated_data_base(tmp_path: Path, images: Path) -> None:
    """Read beyond its end, it would kill the process."""
    texts = write_text_base(tmp_path / "t.db", {"t": record("a.npz")})
    file = images / "data.mdb"
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(DataError, match=r"data\.mdb: \d+ bytes, but \d+ are in use; copy it again"):
        from_uniter_lmdb(tmp_path / "out", str(images), TextsFile(texts, "uniter"), SETTINGS)


def test_two_image_data_bases(tmp_path: Path, images: Path) -> None:
    """The one of ground-truth boxes first, whichever way they are given; names are looked up in their own one only."""
    truth = write_lmdb(tmp_path / "vcr_gt" / "feat_numbb2", {"x.npz": packed(fields(9))})
    texts = write_text_base(
        tmp_path / "t.db",
        {"t": record(["x.npz", "a.npz"]), "swapped": record(["a.npz", "x.npz"]), "one": record("a.npz")},
    )
    for place, order in enumerate((f"{images};{truth}", f"{truth};{images}")):
        out = tmp_path / f"out{place}"
        account = from_uniter_lmdb(out, order, TextsFile(texts, "uniter"), LENIENT)
        assert account.texts.rejected == {"of an image that is missing": 2}
        regions = samples(out)["t"].regions
        assert [(span.name, span.start, span.stop) for span in regions.images] == [("x", 0, 2), ("a", 2, 5)]
        np.testing.assert_array_equal(regions.features[:2], fields(9)["features"][:2].astype(np.float16))


def test_extra_pieces(tmp_path: Path, images: Path) -> None:
    texts = write_text_base(tmp_path / "t.db", {"t": record("a.npz", input_ids=[6, 64])})
    settings = Settings(with_extra(PIECES, 2), command="test", extra_pieces=2)
    from_uniter_lmdb(tmp_path / "out", str(images), TextsFile(texts, "uniter"), settings)
    assert samples(tmp_path / "out")["t"].word_pieces.tolist() == [6, 64]
    assert load_manifest(tmp_path / "out").vocabulary.size == 66


def test_answers(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('{"no": 1, "yes": 0}')
    assert read_answers(path) == ("yes", "no")
    texts = write_text_base(tmp_path / "t.db", {"t": record("a.npz", target={"labels": [2], "scores": [1.0]})})
    settings = Settings(PIECES, command="test", answers=read_answers(path))
    with pytest.raises(IncompleteError) as caught:
        from_uniter_lmdb(tmp_path / "out", str(images), TextsFile(texts, "uniter"), settings)
    assert "has the answer 2, but there are 2 answers" in str(caught.value.account)
    for wrong in ('{"yes": 1}', "[1]", "{"):
        path.write_text(wrong)
        with pytest.raises(DataError, match="answer"):
            read_answers(path)
