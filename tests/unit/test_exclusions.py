"""Lists of images to keep out of a set, in the forms that data sets are published in, and what two sets share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.features import CLASSES, PIECES, fields, row, samples, write_region_files, write_texts
from tests.shards import make_image, make_shards
from villa_ds.cli import main
from villa_ds.data.convert.exclusions import overlap, read_exclusions, read_images
from villa_ds.data.convert.identity import Identity, flickr_photo, identities_of
from villa_ds.data.manifest import Manifest, load_manifest, vocabulary_bytes
from villa_ds.data.writer import Group, SetInfo, ShardWriter, Text
from villa_ds.errors import DamageError, DataError

KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg", "split": "train", "cocoid": 9},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000042.jpg", "split": "test", "cocoid": 42},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000073.jpg", "split": "val", "cocoid": 73},
        {"filepath": "val2014", "filename": "COCO_val2014_000000000074.jpg", "split": "restval", "cocoid": 74},
    ],
}
FLICKR = {"dataset": "flickr30k", "images": [{"filename": "1000092795.jpg", "split": "test"}]}
INSTANCES = {
    "images": [
        {
            "id": 42,
            "file_name": "COCO_val2014_000000000042.jpg",
            "coco_url": "http://images.cocodataset.org/val2014/COCO_val2014_000000000042.jpg",
            "flickr_url": "http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg",
        },
        {"id": 139, "file_name": "000000000139.jpg"},
        {"id": 5, "file_name": "0013ea2087020901.jpg"},
    ],
    "annotations": [{"image_id": 42, "id": 1}],
}
IMAGE_DATA = [
    {"image_id": 1, "coco_id": None, "flickr_id": None, "url": "https://cs.stanford.edu/VG_100K_2/1.jpg"},
    {"image_id": 61512, "coco_id": 248774, "flickr_id": 6273011878},
    {"id": 7, "coco_id": 42, "flickr_id": None},
]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def ids(given: str) -> set[Identity]:
    """All identities of a list but names."""
    return {item for image in read_images(given).images.values() for item in image if item[0] != "name"}


def named_set(folder: Path, *names: str) -> Manifest:
    info = SetInfo(PIECES, 4, "random", "test", "test", CLASSES, "dense")
    with ShardWriter(folder, info) as writer:
        for number, name in enumerate(names):
            image = make_image(np.random.default_rng(number), name, 2, 4, CLASSES)
            writer.add(Group(f"g{number}", [image], [Text(f"t{number}", "word1", [6])]))
    return load_manifest(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("COCO_val2014_000000000042.jpg", {("coco", 42)}),
        ("coco_train2014_000000000042", {("coco", 42)}),
        ("val2014/COCO_val2014_000000000042.npz", {("coco", 42)}),
        ("visual_grounding_coco_gt_000000000042", {("coco", 42)}),
        ("visual_grounding_det_coco_000000000042", {("coco", 42)}),
        ("flickr30k_000000000017", {("flickr", 17)}),
        ("vg_2331234", {("visual-genome", 2331234)}),
        ("nlvr2_dev-850-0-img1", {("name", "dev-850-0-img1")}),
        ("gcc_00000042", set()),
        ("vg_" + "9" * 5000, set()),  # Python refuses to make a number of it
        ("easy_vqa/train/42.png", set()),
    ],
)
def test_identities_of_names(name: str, told: set[Identity]) -> None:
    bare = name.removesuffix(".jpg").removesuffix(".npz").removesuffix(".png")
    assert set(identities_of(name)) == {("name", bare), *told}


def test_mere_numbers() -> None:
    """They tell nothing by themselves: 42 is an image of each data set."""
    assert list(identities_of("000000000042.jpg")) == []
    assert list(identities_of("000000000042.jpg", "coco")) == [("coco", 42)]
    assert list(identities_of("000000000042.jpg", "name")) == [("name", "000000000042")]


def test_flickr_photos() -> None:
    assert flickr_photo("http://farm4.staticflickr.com/3153/2970773875_164f0c0b83_z.jpg") == 2970773875
    assert flickr_photo("http://static.flickr.com/2723/4385058960_b0f291553e.jpg") == 4385058960
    for other in ("http://example.org/4385058960_b0f291553e.jpg", "http://flickr.com/photos/x", "http://[", None, 7):
        assert flickr_photo(other) is None


def test_forms(tmp_path: Path) -> None:
    """What each form of a list names."""
    karpathy = write(tmp_path / "dataset_coco.json", KARPATHY)
    assert ids(f"{karpathy}#val,test") == {("coco", 42), ("coco", 73)}
    assert ids(str(write(tmp_path / "dataset_flickr30k.json", FLICKR))) == {("flickr", 1000092795)}
    # 5 is the number of an image of another data set in COCO's form
    instances = write(tmp_path / "instances.json", INSTANCES)
    assert ids(str(instances)) == {("coco", 42), ("flickr", 2970773875), ("coco", 139)}
    assert ("visual-genome", 5) in ids(f"visual-genome:{instances}")
    questions = write(
        tmp_path / "v2_mscoco_val2014_questions.json", {"questions": [{"image_id": 262148, "question": "?"}]}
    )
    assert ids(str(questions)) == {("coco", 262148)}
    refs = [
        {"ref_id": n, "ann_id": n, "image_id": n, "split": split} for n, split in enumerate(("train", "val", "testA"))
    ]
    assert ids(f"{write(tmp_path / 'refs.json', refs)}#val,testA") == {("coco", 1), ("coco", 2)}
    assert ids(str(write(tmp_path / "vg.json", IMAGE_DATA[1:2]))) == {
        ("visual-genome", 61512),
        ("coco", 248774),
        ("flickr", 6273011878),
    }
    nlvr2 = write(
        tmp_path / "dev.json", '{"identifier": "dev-850-0-1", "sentence": "a"}\n{"identifier": "dev-1-2-0"}\n'
    )
    assert set(read_images(str(nlvr2)).images) == {"dev-850-0-img0", "dev-850-0-img1", "dev-1-2-img0", "dev-1-2-img1"}
    vcr = write(tmp_path / "val.jsonl", '{"img_fn": "lsmdc_1014/1014@0.jpg", "img_id": "val-0"}\n')
    assert read_images(str(vcr)).images == {"lsmdc_1014/1014@0.jpg": {("name", "lsmdc_1014/1014@0")}}
    entailment = write(tmp_path / "snli_ve_test.jsonl", '{"Flickr30K_ID": "4705552913", "gold_label": "neutral"}\n')
    assert ids(str(entailment)) == {("flickr", 4705552913)}
    listed = write(tmp_path / "ids.txt", "coco:42\r\n\nflickr:7\nCOCO_val2014_000000000139.jpg\nname:12\n")
    assert ids(str(listed)) == {("coco", 42), ("flickr", 7), ("coco", 139)}
    assert ("name", "12") in read_images(str(listed)).images["name:12"]
    assert ids(f"visual-genome:{write(tmp_path / 'ids.json', [42, '7', 'vg_8'])}") == {
        ("visual-genome", number) for number in (42, 7, 8)
    }
    write(
        tmp_path / "vqa.db/txt2img.json", {"1": "coco_val2014_000000000042.npz", "2": ["nlvr2_dev-1-0-img0.npz", "b"]}
    )
    assert ids(str(tmp_path / "vqa.db")) == {("coco", 42)}
    made = named_set(tmp_path / "set", "coco_val2014_000000000042", "a.png")
    assert read_images(str(made.folder)).images["a.png"] == {("name", "a")}
    assert ids(str(made.folder)) == {("coco", 42)}


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (KARPATHY, "", r"has several splits; name some, as in list#val,test; there are train \(1\), test \(1\)"),
        (KARPATHY, "#dev", "has no split 'dev'; name some"),
        (INSTANCES, "#val", "tells no splits, so #val cannot be chosen"),
        ({"info": {}}, "", "has no images, annotations or questions"),
        ({"images": [3]}, "", "entry 1 of images is no object"),
        (
            "a\n000042\n",
            "",
            "line 2: 000042 is a number, which does not tell whose id it is; write coco:000042, flickr:",
        ),
        ("coco:x", "", "line 1: 'coco:x' is no id of coco, which are numbers"),
        ([1.5], "", "entry 1: expected a name or an id, found '1.5'"),
        ([{"image_id": 1}, 2], "", "entry 2 is no object, unlike the first"),
        ([{"ann_id": 1, "bbox": []}], "", "entry 1 names no image: it has ann_id, bbox; known are image, image_id"),
        ("[1,", "", "is not JSON: Expecting value"),
        ('{"image_id": 1}\n{"image_id": \n', "", "line 2 is not JSON"),
        ("\n", "", "holds no images"),
        ("[]", "", "holds no images"),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path: Path, content: Any, suffix: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_images(f"{write(tmp_path / 'list', content)}{suffix}")
    assert str(tmp_path / "list") in str(caught.value)


def test_pickles_and_other_folders(tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02]q\x00.")
    with pytest.raises(DataError, match="is a pickle, which may run any code"):
        read_images(str(tmp_path / "refs(unc).p"))
    with pytest.raises(DataError, match=r"neither a shard set \(manifest.json\) nor a UNITER text data base"):
        read_images(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        read_images(str(tmp_path / "nothing#val"))
    made = make_shards(tmp_path / "set", 2, 1, 1)
    shard = made.folder / made.shards[0].name
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(DamageError, match="`villa-ds shards verify` tells more"):
        read_images(str(made.folder))


def test_links(tmp_path: Path) -> None:
    """An image is excluded under every id that it has, also by way of a third data set."""
    image_data = write(tmp_path / "image_data.json", IMAGE_DATA)
    instances = write(tmp_path / "instances.json", INSTANCES)
    listed = write(tmp_path / "flickr.txt", "flickr:2970773875")
    assert read_exclusions([str(listed)]).match(["x"], [("coco", 42)]) is None
    assert read_exclusions([str(listed)], [instances]).match(["x"], [("coco", 42)]) == str(listed)
    assert read_exclusions([str(listed)], [image_data]).match(["vg_7"], ()) is None
    assert read_exclusions([str(listed)], [image_data, instances]).match(["vg_7"], ()) == str(listed)
    with pytest.raises(DataError, match="says of no image how two data sets call it"):
        read_exclusions([str(listed)], [write(tmp_path / "refs.json", [{"image_id": 1}])])
    with pytest.raises(DataError, match="--same-images and --image-ids-of say what --exclude means"):
        read_exclusions([], [image_data])


def test_numbers_are_not_matched_silently(tmp_path: Path) -> None:
    listed = str(write(tmp_path / "ids.txt", "coco:42"))
    with pytest.raises(DataError, match=r"'000000000042' of the texts is a number.*--image-ids-of coco, flickr"):
        read_exclusions([listed]).match(["000000000042"], None)
    assert read_exclusions([listed]).match(["000000000042"], ()) is None  # the source knows that it's no id
    assert read_exclusions([listed], numbers_of="coco").match(["000000000042"], None) == listed
    assert read_exclusions([listed], numbers_of="flickr").match(["000000000042"], None) is None
    names = str(write(tmp_path / "names.txt", "name:000000000042"))
    assert read_exclusions([names]).match(["000000000042"], ()) == names


def test_excluded_texts_are_counted_by_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read = written + rejected + excluded, without leave to reject anything; a list that excludes nothing says so."""
    names = ["coco_val2014_000000000042", "coco_val2014_000000000043", "coco_val2014_000000000044", "spare"]
    images = write_region_files(tmp_path / "images", {name: fields(seed) for seed, name in enumerate(names)})
    rows = [
        row(names[0], "a"),
        row(names[0], "b"),
        row([names[2], names[1]], "c"),
        row(names[2], "d"),
        row("gone", "e"),
    ]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    (tmp_path / "vocab.txt").write_bytes(vocabulary_bytes(PIECES))
    karpathy, listed = (
        write(tmp_path / "karpathy.json", KARPATHY),
        write(tmp_path / "ids.txt", "coco:43\ngone\ncoco:42"),
    )
    nothing = write(tmp_path / "nothing.txt", "coco:1")
    command = ["shards", "from-npz", "--features", str(images), "--texts", str(texts)]
    command += ["--vocabulary", str(tmp_path / "vocab.txt")]
    for item in (f"{karpathy}#test", listed, nothing):
        command += ["--exclude", str(item)]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "texts: 5 read = 1 written + 0 rejected + 4 excluded",
        f"  2 excluded by {karpathy}#test, first: a",
        f"  2 excluded by {listed}, first: c",
        f"  0 excluded by {nothing}",
        "images: 4 read = 1 written + 0 rejected + 2 excluded + 1 without texts",
        f"  1 excluded by {karpathy}#test, first: {names[0]}",
        f"  1 excluded by {listed}, first: {names[1]}",
        f"  0 excluded by {nothing}",
    ]
    assert list(samples(tmp_path / "out")) == ["d"]
    assert main(["shards", "overlap", str(tmp_path / "out"), f"{karpathy}#test"]) == 0


def test_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = named_set(tmp_path / "train", "COCO_val2014_000000000042", "same.png", "vg_61512", "other")
    test = named_set(tmp_path / "test", "coco_val2014_000000000042", "same", "coco_train2014_000000248774")
    apart = named_set(tmp_path / "apart", "coco_val2014_000000000043")
    command = ["shards", "overlap", str(train.folder), str(test.folder)]
    assert main(command) == 2
    told = capsys.readouterr()
    head = f"{train.folder} 4 images, {test.folder} 3 images"
    assert told.out == f"{head}: 2 shared\n  COCO_val2014_000000000042\n  same.png\n"
    assert "share 'COCO_val2014_000000000042' and 1 more; convert one of them again with --exclude" in told.err
    image_data = write(tmp_path / "image_data.json", IMAGE_DATA)
    assert overlap(str(train.folder), str(test.folder), [image_data]).shared[2:] == ("vg_61512",)
    assert main(["shards", "overlap", str(train.folder), str(apart.folder)]) == 0
    assert capsys.readouterr().out == f"{train.folder} 4 images, {apart.folder} 1 images: 0 shared\n"
    numbers = named_set(tmp_path / "numbers", "000000000042")
    with pytest.raises(DataError, match="the group g0: 000000000042 is a number"):
        overlap(str(numbers.folder), str(train.folder))
    assert overlap(f"coco:{numbers.folder}", str(train.folder)).shared == ("coco:000000000042",)
