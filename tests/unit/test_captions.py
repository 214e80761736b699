"""Captions in the forms that they are published in: what is read, what it is joined to, and what is wrong."""

import base64
import hashlib
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.features import (
    PIECES,
    SETTINGS,
    fields,
    listed,
    log,
    packed,
    rejected,
    samples,
    scanned,
    write_lmdb,
    write_region_files,
)
from villa_ds.cli import main
from villa_ds.data.convert import json_files
from villa_ds.data.convert.account import Account
from villa_ds.data.convert.captions import CaptionTexts, NameTemplate
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest, vocabulary_bytes
from villa_ds.errors import DataError

COCO = {
    "info": {"year": 2014},
    "images": [
        {
            "id": 9,
            "file_name": "COCO_train2014_000000000009.jpg",
            "coco_url": "http://images.cocodataset.org/train2014/COCO_train2014_000000000009.jpg",
            "flickr_url": "http://farm5.staticflickr.com/4026/4622125393_84c1d62d5f_z.jpg",
        },
        {"id": 25, "file_name": "COCO_train2014_000000000025.jpg"},
    ],
    "annotations": [
        {"image_id": 25, "id": 48, "caption": "word1 word2"},
        {"image_id": 9, "id": 661611, "caption": " word3\n"},
        {"image_id": 9, "id": 661612, "caption": "word4"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "sentids": [770337, 771687],
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "split": "test",
            "sentences": [
                {"tokens": ["word1"], "raw": "word1.", "imgid": 0, "sentid": 770337},
                {"tokens": ["word2"], "raw": "word2", "imgid": 0, "sentid": 771687},
            ],
            "cocoid": 391895,
        },
        {
            "filepath": "train2014",
            "filename": "COCO_train2014_000000000009.jpg",
            "split": "train",
            "sentences": [{"raw": "word3", "sentid": 5}],
            "cocoid": 9,
        },
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000000074.jpg",
            "split": "restval",
            "sentences": [{"raw": "word4", "sentid": 6}],
            "cocoid": 74,
        },
    ],
}
FLICKR = {
    "dataset": "flickr30k",
    "images": [{"filename": "1000092795.jpg", "split": "train", "sentences": [{"raw": "word1", "sentid": 0}]}],
}
REGIONS = [
    {
        "id": 1,
        "regions": [
            {"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "word1", "y": 57, "x": 421},
            {"region_id": 1383, "width": 182, "height": 5, "image_id": 1, "phrase": "word1", "y": 372, "x": 241},
        ],
    },
    {"image_id": 7, "regions": [{"region_id": 9, "phrase": "word2"}]},
]
URL = "http://static.flickr.com/2723/4385058960_b0f291553e.jpg"
OTHER = "https://example.org/a%20b/photo.png?size=1"


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco(tmp_path: Path) -> None:
    path = write(tmp_path / "captions_train2014.json", COCO)
    assert listed(TextsFile(path, "coco"), tmp_path) == [
        ("48", "COCO_train2014_000000000025", "word1 word2"),
        ("661611", "COCO_train2014_000000000009", " word3\n"),
        ("661612", "COCO_train2014_000000000009", "word4"),
    ]
    named = TextsFile(path, "coco", "coco_train2014_{id:012}.npz")
    assert {image for _, image, _ in listed(named, tmp_path)} == {f"coco_train2014_0000000000{n:02}" for n in (9, 25)}
    also = {row.id: set(row.also or ()) for row, _ in scanned(named, tmp_path)}
    assert also["661611"] >= {("coco", 9), ("flickr", 4622125393)}
    assert also["48"] == {("coco", 25), ("name", "COCO_train2014_000000000025")}


def test_karpathy(tmp_path: Path) -> None:
    path = write(tmp_path / "dataset_coco.json", KARPATHY)
    texts = TextsFile(path, "karpathy", "coco_{folder}_{id:012}", ("train", "restval"))
    assert listed(texts, tmp_path) == [
        ("5", "coco_train2014_000000000009", "word3"),
        ("6", "coco_val2014_000000000074", "word4"),
    ]
    assert [row[0] for row in listed(TextsFile(path, "karpathy", splits=("test",)), tmp_path)] == ["770337", "771687"]
    assert listed(TextsFile(path, "karpathy", splits=("test",)), tmp_path)[0][1] == "COCO_val2014_000000391895"
    flickr = TextsFile(write(tmp_path / "dataset_flickr30k.json", FLICKR), "karpathy", "flickr30k_{id:012}")
    [(row, _)] = scanned(flickr, tmp_path)
    assert (row.images, row.also) == (("flickr30k_001000092795",), (("flickr", 1000092795),))
    with pytest.raises(
        DataError, match=r"several splits; name some, as in --split train,restval; there are test \(1\)"
    ):
        listed(TextsFile(path, "karpathy"), tmp_path)
    with pytest.raises(DataError, match="has no split 'val'"):
        listed(TextsFile(path, "karpathy", splits=("train", "val")), tmp_path)


def test_visual_genome(tmp_path: Path) -> None:
    """Every region's phrase is a caption of its own, equal ones too."""
    path = write(tmp_path / "region_descriptions.json", REGIONS)
    assert listed(TextsFile(path, "visual-genome"), tmp_path) == [
        ("1382", "1", "word1"),
        ("1383", "1", "word1"),
        ("9", "7", "word2"),
    ]
    rows = scanned(TextsFile(path, "visual-genome", "vg_{id}"), tmp_path)
    assert [(row.images[0], row.also) for row, _ in rows][1:] == [
        ("vg_1", (("visual-genome", 1),)),
        ("vg_7", (("visual-genome", 7),)),
    ]


def test_visual_genome_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a piece of the file ends; and damage is not mistaken for an element that goes on for ever."""
    path = write(tmp_path / "region_descriptions.json", json.dumps(REGIONS, indent=1) + "\n")
    expected = listed(TextsFile(path, "visual-genome"), tmp_path)
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(json_files, "_PIECE", size)
        assert listed(TextsFile(path, "visual-genome"), tmp_path) == expected
    monkeypatch.setattr(json_files, "_PIECE", 7)
    monkeypatch.setattr(json_files, "_LONGEST", 50)
    with pytest.raises(DataError, match="entry 1 is not JSON"):
        listed(TextsFile(path, "visual-genome"), tmp_path)
    assert listed(TextsFile(write(path, " [ ]"), "visual-genome"), tmp_path) == []


def test_conceptual(tmp_path: Path) -> None:
    """Line ends that str knows but the file does not mean belong to the caption."""
    content = f"word1 word2\t{OTHER}\nword3\u2028word4\t{URL}\r\n\nword5\t{OTHER}#2\n"
    path = write(tmp_path / "Train_GCC-training.tsv", content)

    def names(template: str) -> list[str]:
        return [image for _, image, _ in listed(TextsFile(path, "conceptual", template), tmp_path)]

    assert listed(TextsFile(path, "conceptual", "gcc_{row:08}"), tmp_path) == [
        ("1", "gcc_00000000", "word1 word2"),
        ("2", "gcc_00000001", "word3\u2028word4"),
        ("4", "gcc_00000002", "word5"),
    ]
    assert names("{line}") == ["1", "2", "4"]
    assert names("{file}") == ["photo", "4385058960_b0f291553e", "photo"]
    assert names("training/{url_crc32}")[0] == f"training/{zlib.crc32(OTHER.encode())}"
    assert names("{url_crc32:08x}")[0] == f"{zlib.crc32(OTHER.encode()):08x}"
    for name in ("md5", "sha1", "sha256"):
        assert names(f"{{url_{name}}}")[0] == hashlib.new(name, OTHER.encode()).hexdigest()
    also = [row.also for row, _ in scanned(TextsFile(path, "conceptual", "{row}"), tmp_path)]
    assert also == [(), (("flickr", 4385058960),), ()]


def test_sbu(tmp_path: Path) -> None:
    """The JSON file and the pair of text files say the same."""
    content = {"image_urls": [URL, OTHER], "user_ids": ["a", "b"], "captions": ["word1", "word2"]}
    path = write(tmp_path / "sbu-captions-all.json", content)
    expected = [("1", "sbu_0", "word1"), ("2", "sbu_1", "word2")]
    assert listed(TextsFile(path, "sbu", "sbu_{row}"), tmp_path) == expected
    texts = write(tmp_path / "SBU_captioned_photo_dataset_captions.txt", "word1\nword2\n")
    urls = write(tmp_path / "SBU_captioned_photo_dataset_urls.txt", f"{URL}\n{OTHER}\n")
    assert listed(TextsFile(texts, "sbu", "sbu_{row}", urls=urls), tmp_path) == expected
    assert rejected(TextsFile(path, "sbu", "{flickr}"), tmp_path) == [
        "entry 2 has the flickr None, of which --image-name cannot make a name"
    ]
    with pytest.raises(DataError, match=r"captions.txt: ends after line 2, .*urls.txt does not"):
        listed(TextsFile(texts, "sbu", "{row}", urls=write(urls, f"{URL}\n" * 3)), tmp_path)
    write(path, {**content, "captions": ["word1"]})
    with pytest.raises(DataError, match="two lists of one length; of SBU's text files give the captions as --texts"):
        listed(TextsFile(path, "sbu", "{row}"), tmp_path)


def _annotation(**changes: Any) -> dict[str, Any]:
    return {**COCO, "annotations": [{"image_id": 9, "id": 1, "caption": "word1", **changes}]}


@pytest.mark.parametrize(
    ("kind", "content", "template", "details"),
    [
        ("coco", _annotation(image_id=3), None, ["annotation 1 is of the image 3, which is not in images"]),
        ("coco", _annotation(caption=None), None, ["annotation 1 has no caption, but 'None'"]),
        ("coco", _annotation(id=True), None, ["annotation 1 has the id True"]),
        ("coco", _annotation(image_id=[9]), None, ["annotation 1 is of the image [9], which is not in images"]),
        ("coco", _annotation(caption="\ud800"), None, [r"annotation 1 has no caption, but '\ud800'"]),
        (
            "coco",
            {"images": [{"id": 9}], "annotations": [{"image_id": 9, "id": 1, "caption": "a"}]},
            None,
            ["annotation 1 has the file None, of which --image-name cannot make a name"],
        ),
        ("karpathy", {"images": [{"split": "a", "filename": "b"}]}, None, ["image 1 has no sentences, but 'None'"]),
        (
            "karpathy",
            {"images": [{"split": "a", "filename": "b", "sentences": [{"raw": "word1"}]}]},
            None,
            ["image 1 has the id None"],
        ),
        ("visual-genome", [{"id": 1, "regions": None}], None, ["image 1 has no regions, but 'None'"]),
        (
            "visual-genome",
            [{"regions": [{"region_id": 5, "phrase": "a"}]}],
            None,
            ["image 1 has the id None, of which --image-name cannot make a name"],
        ),
        (
            "conceptual",
            f"word1\t{URL}\nword1\nword1\tword2\n{URL}\tword1\nword1\t{URL}\tlabels\n",
            "{row}",
            [
                "line 2 is no caption, tab, URL, but 'word1'",
                "line 3 is no caption, tab, URL, but 'word1\\tword2'",
                "line 4 has the URL first; exchange the two columns of the file",
                f"line 5 is no caption, tab, URL, but 'word1\\t{URL}\\tlabels'",
            ],
        ),
        ("sbu", {"image_urls": [None], "captions": ["a"]}, "{row}", ["entry 1 has no URL, but 'None'"]),
        ("sbu", {"image_urls": [URL], "captions": [None]}, "{row}", ["entry 1 has no caption, but 'None'"]),
    ],
)
def test_records_that_are_rejected(
    tmp_path: Path, kind: str, content: Any, template: str | None, details: list[str]
) -> None:
    path = write(tmp_path / "texts", content)
    assert rejected(TextsFile(path, kind, template), tmp_path) == details


def test_an_id_that_comes_again_is_rejected(tmp_path: Path) -> None:
    twice = {**COCO, "annotations": [*COCO["annotations"], COCO["annotations"][0]]}  # type: ignore[misc]
    path = write(tmp_path / "texts", twice)
    assert rejected(TextsFile(path, "coco"), tmp_path) == ["the id occurs before; the first is taken"]
    assert log(tmp_path / "account") == [("48", "whose name or id came before")]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "coco",
            {"questions": []},
            "images is missing or no list; is it a file of the format that --texts-format says",
        ),
        ("coco", {"images": [], "annotations": [1]}, "entry 1 of annotations is no object, but '1'; mend the file"),
        ("coco", '{"images": [', "texts: is not JSON: Expecting value: line 1 column 13"),
        ("karpathy", [], "images is missing or no list"),
        ("visual-genome", {"images": []}, "is no JSON list; is it the file that was meant, and unpacked"),
        ("visual-genome", [REGIONS[0], 7], "entry 2 of the list is no object"),
        ("visual-genome", json.dumps(REGIONS)[:-9], "entry 2 is not JSON: .*; is the file whole"),
        ("visual-genome", json.dumps(REGIONS)[:-1], "after entry 2 comes '', expected a comma"),
        ("visual-genome", json.dumps(REGIONS) + "[", "after the list comes '\\['"),
        ("visual-genome", "", "is no JSON list"),
        ("sbu", [], "expected an object with image_urls and captions"),
    ],
)
def test_files_of_another_form(tmp_path: Path, kind: str, content: Any, message: str) -> None:
    path = write(tmp_path / "texts", content)
    with pytest.raises(DataError, match=message) as caught:
        listed(TextsFile(path, kind, "{row}" if kind == "sbu" else None), tmp_path)
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "texts").write_bytes(f"word1\t{URL}\n".encode() + b"\xff\t\n")
    with pytest.raises(DataError, match="texts: line 2 is not UTF-8: invalid start byte; convert the file"):
        listed(TextsFile(tmp_path / "texts", "conceptual", "{row}"), tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("coco", "is the same for all images; known are {id}, {file}, numbers also as in {id:012}"),
        ("{name}", "cannot fill in 'name'; known are {id}, {file}"),
        ("{id.real}", "cannot fill in 'id.real'"),
        ("{id!r}", "cannot fill in 'id'"),
        ("{id:{file}}", "cannot fill in 'id'"),
        ("{id:9999}", "cannot fill in 'id'"),
        ("{}", "cannot fill in ''"),
        ("{id", "expected '}' before end of string"),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        NameTemplate(template, ("id", "file"))
    assert f"--image-name {template!r}" in str(caught.value)
    assert message in str(caught.value)


def test_template() -> None:
    template = NameTemplate("{{{file}}}-{id:04x}.npz", ("id", "file"))
    assert template.fill("record 1", {"id": 255, "file": "a"}) == "{a}-00ff"
    assert template.fill("record 1", {"id": "255", "file": "a"}) == "{a}-00ff"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "coco", "splits": ("train",)},
            "--split is for --texts-format karpathy, parquet, arrow, not for coco",
        ),
        ({"format": "jsonl", "image_name": "{id}"}, "--image-name is for --texts-format coco, karpathy"),
        ({"format": "conceptual", "urls": Path("a")}, "--urls is for --texts-format sbu, not for conceptual"),
        ({"format": "coco", "id_column": "id"}, "--id-column is for --texts-format parquet, arrow, not for coco"),
        ({"format": "uniter", "image_name": "{id}"}, "--image-name is for"),
        ({"format": "csv"}, "--texts-format 'csv' is not one of uniter, jsonl, coco"),
        (
            {"format": "sbu"},
            "sbu has no names of images: give --image-name as the features have them, from {row}, {line}",
        ),
        ({"format": "conceptual"}, "conceptual has no names of images"),
        ({"format": "uniter"}, "--texts-format uniter is for from-uniter-lmdb"),
        ({"format": "coco"}, "nothing.json: no such file of texts"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        TextsFile(Path("nothing.json"), **options).open(SETTINGS)
    assert message in str(caught.value)


def test_another_process_reads_by_itself(tmp_path: Path) -> None:
    """What travels to it is where the captions are, not the captions or what lists them."""
    path = write(tmp_path / "captions.json", COCO)
    with Account(tmp_path / "account") as account:
        source = TextsFile(path, "coco").open(SETTINGS)
        assert isinstance(source, CaptionTexts)
        rows = list(source.scan(account.texts))
        assert source.read(rows[1].place).text == " word3\n"
        other = pickle.loads(pickle.dumps(source))  # noqa: S301  # as multiprocessing does
        assert [other.read(row.place).id for row in reversed(rows)] == ["661612", "661611", "48"]
        source.close()
        with pytest.raises(FileNotFoundError):
            pickle.loads(pickle.dumps(source)).read(0)  # noqa: S301


def lmdb_images(folder: Path, names: list[str]) -> list[str]:
    values = {f"{name}.npz": packed(fields(seed)) for seed, name in enumerate(names)}
    return ["from-uniter-lmdb", "--images", str(write_lmdb(folder / "all", values))]


def npz_images(folder: Path, names: list[str]) -> list[str]:
    write_region_files(folder, {name: fields(seed) for seed, name in enumerate(names)})
    return ["from-npz", "--features", str(folder)]


def tsv_images(folder: Path, names: list[str]) -> list[str]:
    folder.mkdir()
    rows = []
    for seed, name in enumerate(names):
        content = fields(seed)
        arrays = (content["norm_bb"][:, :4] * np.float32(100), content["features"])
        rows.append(
            "\t".join([name, "100", "100", "3", *(base64.b64encode(part.tobytes()).decode() for part in arrays)])
        )
    return ["from-tsv", "--features", str(write(folder / "features.tsv", "\n".join(rows) + "\n"))]


@pytest.mark.parametrize("features", [lmdb_images, npz_images, tsv_images])
def test_captions_with_any_features(
    tmp_path: Path, features: Callable[[Path, list[str]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """COCO's captions as published, exclusions by COCO's ids, and an empty caption, which is rejected."""
    names = [f"coco_train2014_0000000000{number:02}" for number in (9, 25, 30)]
    images = features(tmp_path / "images", names)
    captions = {**COCO, "images": [*COCO["images"], {"id": 30, "file_name": "COCO_train2014_000000000030.jpg"}]}  # type: ignore[misc]
    captions["annotations"] = [
        *COCO["annotations"],  # type: ignore[misc]
        {"image_id": 30, "id": 5, "caption": "word5"},
        {"image_id": 25, "id": 6, "caption": " \n"},
    ]
    texts = write(tmp_path / "captions_train2014.json", captions)
    (tmp_path / "vocab.txt").write_bytes(vocabulary_bytes(PIECES))
    command = ["shards", *images, "--texts", str(texts), "--texts-format", "coco"]
    command += ["--image-name", "coco_train2014_{id:012}", "--vocabulary", str(tmp_path / "vocab.txt")]
    command += ["--exclude", str(write(tmp_path / "ids.txt", "coco:30\n"))]
    assert main([*command, str(tmp_path / "refused")]) == 2
    capsys.readouterr()
    assert main([*command, "--allow-rejected", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        "texts: 5 read = 3 written + 1 rejected + 1 excluded",
        "  1 against the contract, first: 6: text '6' has no word pieces; leave it out",
        f"  1 excluded by {tmp_path / 'ids.txt'}, first: 5",
    ]
    found = samples(tmp_path / "out")
    assert [[PIECES[piece] for piece in found[key].word_pieces] for key in ("48", "661611", "661612")] == [
        ["word1", "word2"],
        ["word3"],
        ["word4"],
    ]
    assert found["48"].regions.images[0].name == names[1]
    np.testing.assert_array_equal(found["48"].regions.features, fields(1)["features"].astype(np.float16))
    assert load_manifest(tmp_path / "out").source.endswith("captions_train2014.json")
