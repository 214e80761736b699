import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.downstream import make_task_shards
from tests.shards import make_shards
from villa_ds.data import npy
from villa_ds.data.contract import target_problems
from villa_ds.data.manifest import fingerprint_of
from villa_ds.data.verify import draw_groups, verify, verify_sample
from villa_ds.errors import DamageError, DataError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    make_shards(folder, groups=6, shards=2)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))


def rewrite(folder: Path, change, shard: str = "shard-000000.tar") -> None:
    """Rewrite a tar with `change(name, content) -> content or None` and make the manifest agree: a wrong writer."""
    with tarfile.open(folder / shard) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            for kept_name, kept in change(name, content):
                header = tarfile.TarInfo(kept_name)
                header.size = len(kept)
                archive.addfile(header, io.BytesIO(kept))
    (folder / shard).write_bytes(buffer.getvalue())
    seal(folder)


def seal(folder: Path) -> None:
    """Make sizes, checksums and the fingerprint of the manifest those of the files."""
    content = json.loads((folder / "manifest.json").read_text())
    for shard in content["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    for name in content["index_files"]:
        content["index_files"][name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    content["vocabulary"]["sha256"] = hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest()
    content["fingerprint"] = fingerprint_of(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def changed_array(extension: str, change, key: str = "g00001"):
    """A `change` for `rewrite` that maps one group's array."""

    def apply(name, content):
        if name == f"{key}.{extension}.npy":
            array = np.load(io.BytesIO(content)).copy()
            content = npy.encode(change(array))
        return [(name, content)]

    return apply


def changed_record(change, key: str = "g00001"):
    def apply(name, content):
        if name == f"{key}.json":
            record = json.loads(content)
            change(record)
            content = json.dumps(record).encode()
        return [(name, content)]

    return apply


def put(array, place, value):
    array[place] = value
    return array


@pytest.mark.parametrize("settings", [{}, {"label_format": "topk", "images_per_group": 2}, {"classes": 0}])
def test_a_set_as_written_has_no_problems(tmp_path, settings):
    manifest = make_shards(tmp_path / "set", groups=6, shards=2, **settings)
    report = verify(tmp_path / "set")
    assert report.problems == ()
    assert str(report).endswith(f"{manifest.num_pairs} pairs, 6 groups, 2 shards, all as they should be")
    report.check()


def test_a_missing_manifest_is_an_input_error(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no manifest"):
        verify(folder)


def test_a_truncated_tar_is_damage(folder):
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:7000])
    report = verify(folder)
    assert {problem.file for problem in report.problems} == {"shard-000001.tar"}
    assert "(7000 bytes, expected " in report.problems[0].text
    assert any("groups, the manifest says 3" in problem.text for problem in report.problems)
    with pytest.raises(DamageError, match=r"shard-000001\.tar: sha256 is .* copy the damaged files again"):
        report.check()


def test_every_flipped_byte_of_a_shard_is_damage(folder):
    path = folder / "shard-000000.tar"
    data = path.read_bytes()
    for place in range(0, len(data), 997):  # headers, array headers, numbers, JSON and padding
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        report = verify(folder)
        assert report.problems[0].file == "shard-000000.tar"
        with pytest.raises(DamageError):
            report.check()


@pytest.mark.parametrize("name", ["shard-000001.tar", "vocab.txt", "pair_id.npy", "group_offset.npy"])
def test_a_missing_or_altered_file_is_damage(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DamageError, match=f"{name}: sha256 is"):
        verify(folder).check()
    path.unlink()
    with pytest.raises(DamageError, match=f"{name}: missing or unreadable"):
        verify(folder).check()


VIOLATIONS = {
    "width": (
        changed_array("features", lambda a: a[:, :-1]),
        r"features have shape \(\d, 15\), expected \[regions, 16\]",
    ),
    "nan": (changed_array("features", lambda a: put(a, (1, 2), np.nan)), "features of region 1 are not finite"),
    "type": (changed_array("features", lambda a: a.astype(np.float32)), r"features\.npy is float32, expected float16"),
    "scalar": (changed_array("features", lambda a: a[0, 0]), r"features have shape \(1,\)"),
    "box": (changed_array("boxes", lambda a: put(a, (1, 2), 1.5)), r"box 1 is .* expected 0 to 1"),
    "area": (changed_array("boxes", lambda a: put(a, (0, 6), 0.99)), "area = w h"),
    "labels": (changed_array("labels", lambda a: a * 2), r"no distribution \(sum 2"),
    "regions": (changed_array("features", lambda a: a[1:]), r"boxes have shape \(\d, 7\), expected"),
    "piece": (
        changed_record(lambda r: r["texts"][0]["word_pieces"].__setitem__(0, 64)),
        "but the vocabulary has 64",
    ),
    "span": (changed_record(lambda r: r["images"][0].update(stop=1)), "the images have 1 regions together"),
    "id": (changed_record(lambda r: r["texts"][0].update(id="other")), r"the pair arrays say \[\(b't"),
    "no texts": (changed_record(lambda r: r.update(texts=[])), "has no texts"),
    "no images": (changed_record(lambda r: r.pop("images")), "json is not of the contract's form: images is missing"),
    "target": (
        changed_record(lambda r: r["texts"][0].update(target=3)),
        r"texts\.0\.target is missing or of another type than dict",
    ),
    "number as id": (
        changed_record(lambda r: r["texts"][0].update(id=3)),
        r"texts\.0\.id is missing or of another type",
    ),
    "half a character": (
        changed_record(lambda r: r["images"][0].update(name="\udc00")),
        r"json cannot be decoded: '\\udc00' is not valid Unicode",
    ),
    "surrogate": (changed_record(lambda r: r["texts"][0].update(id="\ud800")), "is not valid Unicode"),
    "fraction": (
        changed_record(lambda r: r["texts"][0]["word_pieces"].__setitem__(0, 8.5)),
        r"texts\.0\.word_pieces holds something else than integers",
    ),
    "infinity": (
        changed_record(lambda r: r["texts"][0]["target"].update(scores=[float("inf")])),
        "json cannot be decoded: Infinity is no JSON number",
    ),
    "nesting": (
        lambda name, content: [(name, b"[" * 100_000 if name == "g00001.json" else content)],
        "json cannot be decoded: nested too deeply",
    ),
    "answer": (
        changed_record(lambda r: r["texts"][0]["target"].update(labels=[5])),
        r"target of text 't\d+': label 5 is not among the set's 5 answers",
    ),
    "pickle": (
        lambda name, content: [
            (name, b"\x80\x04K\x01." if name == "g00001.boxes.npy" else content),
        ],
        r"boxes\.npy cannot be decoded",
    ),
    "member": (
        lambda name, content: [] if name == "g00001.labels.npy" else [(name, content)],
        r"has the members \['boxes.npy', 'features.npy', 'json'\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violations_name_shard_and_key(folder, change, message):
    rewrite(folder, change)
    report = verify(folder)
    with pytest.raises(DataError, match=rf"shard-000000\.tar: group 'g00001': .*{message}"):
        report.check()
    # A changed size moves the groups behind; nothing else may be reported.
    others = [problem for problem in report.problems if problem.key != "g00001"]
    assert all("group_offset.npy says" in problem.text for problem in others)


ANSWERS = {"answers": [[6], [7, 8]], "answer": 1}


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({}, None),
        ({"labels": [], "scores": []}, None),
        ({"labels": [4, 0], "scores": [1.0, 0.3]}, None),
        ({"labels": [5], "scores": [1]}, "label 5 is not among the set's 5 answers"),
        ({"labels": [1, 1], "scores": [1, 1]}, "labels [1, 1] name an answer twice"),
        ({"labels": [1]}, "labels [1], scores None: expected answer numbers and as many scores in 0..1"),
        ({"labels": [1], "scores": [1.5]}, "labels [1], scores [1.5]: expected answer numbers and as many scores"),
        ({"labels": [1], "scores": [float("nan")]}, "labels [1], scores [nan]: expected answer numbers"),
        ({"labels": [True], "scores": [1]}, "labels [True], scores [1]: expected answer numbers"),
        ({"label": 1}, None),
        ({"label": 0.5}, "label 0.5: expected an integer from 0 on"),
        (ANSWERS, None),
        (ANSWERS | {"answer": 2}, "answer 2: expected the place of one of the 2 answers"),
        ({"rationales": [[6], []]}, "rationales [[6], []]: expected lists of word-piece ids, none empty"),
        ({"rationales": [[64]]}, "rationales have the word-piece id 64, but the vocabulary has 64"),
        ({"region": 2}, None),
        ({"region": 3}, "region 3: expected one of the 3 regions, from 0 on"),
        ({"box": [0, 1.5, 4, 5], "image_size": [10, 10]}, None),
        ({"box": [0, 1, 4, 0], "image_size": [10, 10]}, "box [0, 1, 4, 0]: expected x, y, width and height in pixels"),
        ({"box": [0, 1, 4, 5]}, "image_size None: expected the image's width and height, which a box needs"),
        ({"anything": "else"}, None),
    ],
)
def test_targets_have_the_form_of_their_names(target, problem):
    found = list(target_problems(target, regions=3, answers=5, vocabulary_size=64))
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(problem)
    assert not list(target_problems({"labels": [70], "scores": [1.0]}, regions=3, answers=0, vocabulary_size=64))


def test_a_tar_that_is_no_plain_row_of_files(folder):
    def with_member(kind: bytes, size: int = 0) -> str:
        path = folder / "shard-000000.tar"
        header = tarfile.TarInfo("g00009.json")
        header.type, header.size, header.linkname = kind, size, "g00000.json"
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
        seal(folder)
        return str(verify(folder))

    assert "'g00009.json' is a link, folder or other thing that is no plain file" in with_member(tarfile.SYMTYPE)
    assert "'g00009.json' is a link" in with_member(tarfile.LNKTYPE)
    assert "'g00009.json' ends at 8589935103 of 512 bytes" in with_member(tarfile.REGTYPE, 8**11 - 1)
    assert "not a readable tar after 0 groups" in with_member(tarfile.REGTYPE, 1 << 80)


def test_processes_find_the_same(folder):
    rewrite(folder, changed_array("features", lambda a: put(a, (0, 0), np.inf), "g00000"))
    rewrite(folder, lambda name, content: [(name.replace("g00004.", "g00001."), content)], "shard-000001.tar")
    report = verify(folder, processes=2)
    assert report == verify(folder)
    assert [problem.text for problem in report.problems][-1] == "the key occurs twice in the set"
    assert report.groups_read == 6


@pytest.mark.parametrize("total", [1, 7, 40])
def test_drawn_groups_are_spread_and_repeatable(total):
    for count in (1, 3, 7):
        drawn = draw_groups(total, count, seed=5)
        kept = min(count, total)
        assert len(set(drawn.tolist())) == kept
        assert ((drawn * kept // total) - np.arange(kept) <= 0).all()  # one from each stretch
        assert (drawn >= np.arange(kept) * total // kept).all()
        assert np.array_equal(drawn, draw_groups(total, count, seed=5))
    assert draw_groups(1000, 3, seed=5).tolist() != draw_groups(1000, 3, seed=6).tolist()


def test_a_sample_says_what_it_left_out(folder):
    report = verify_sample(folder, 2)
    assert report.problems == ()
    assert str(report).endswith(
        "6 groups, 2 shards, all as they should be as far as was looked: 2 of 6 groups; the rest not read, "
        "nor the checksums of shards"
    )
    assert "as far as" not in str(verify_sample(folder, 6))
    rewrite(folder, changed_array("features", lambda a: put(a, (0, 0), np.inf), "g00004"), "shard-000001.tar")
    seen = [seed for seed in range(20) if 4 in draw_groups(6, 2, seed)]
    assert 0 < len(seen) < 20
    for seed in range(20):
        found = [(problem.file, problem.key) for problem in verify_sample(folder, 2, seed).problems]
        assert found == ([("shard-000001.tar", "g00004")] if seed in seen else [])
    with pytest.raises(DataError, match=r"not finite.*; verify the whole set, which tells damage from a wrong writer"):
        verify_sample(folder, 2, seen[0]).check()


def test_a_sample_sees_sizes_and_moved_groups(folder):
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:7000])
    assert [problem.text for problem in verify_sample(folder, 1).problems] == [
        f"has 7000 bytes, the manifest says {len(data)}"
    ]
    path.unlink()
    assert [str(problem) for problem in verify_sample(folder, 1).problems] == [
        "shard-000001.tar: missing or unreadable"
    ]
    path.write_bytes(data[:512] + data[1024:] + bytes(512))
    with pytest.raises(DamageError, match=r"shard-000001\.tar: ends at byte \d+, where group 4 should be"):
        verify_sample(folder, 6).check()


def test_every_problem_is_listed(folder):
    rewrite(folder, changed_array("features", lambda a: put(a, (0, 0), np.inf), "g00000"))
    rewrite(folder, changed_array("features", lambda a: put(a, (0, 0), np.inf), "g00004"), "shard-000001.tar")
    report = verify(folder)
    assert [(problem.file, problem.key) for problem in report.problems] == [
        ("shard-000000.tar", "g00000"),
        ("shard-000001.tar", "g00004"),
    ]
    lines = str(report).splitlines()
    assert lines[0].startswith("shard-000000.tar: group 'g00000': features of region 0")
    assert lines[-1].endswith("2 problems")


def test_a_key_that_webdataset_would_split_or_merge(folder):
    rewrite(folder, lambda name, content: [(name.replace("g00001.", "g00 01."), content)])
    assert any("may hold 1 to 80 letters" in problem.text for problem in verify(folder).problems)
    rewrite(folder, lambda name, content: [(name.replace("g00 01.", "g00004."), content)])
    assert [(problem.file, problem.text) for problem in verify(folder).problems] == [
        ("shard-000001.tar", "the key occurs twice in the set")
    ]


def test_groups_that_are_too_many_or_too_few(folder):
    rewrite(folder, lambda name, content: [] if name.startswith("g00002.") else [(name, content)])
    assert [problem.text for problem in verify(folder).problems] == ["2 groups, the manifest says 3"]
    extra = ("g00009.json", b"{}")
    rewrite(
        folder,
        lambda name, content: [(name, content), *([extra] if name == "g00005.labels.npy" else [])],
        "shard-000001.tar",
    )
    assert [str(problem) for problem in verify(folder).problems][1:] == [
        "shard-000001.tar: group 'g00009': has the members ['json'], "
        "expected ['boxes.npy', 'features.npy', 'json', 'labels.npy']",
        "shard-000001.tar: 4 groups, the manifest says 3",
    ]


def test_index_arrays_are_checked_against_the_tars_and_each_other(folder):
    def resealed(name, change):
        array = np.load(folder / f"{name}.npy")
        np.save(folder / f"{name}.npy", change(array.copy()))
        seal(folder)
        texts = [str(problem) for problem in verify(folder).problems]
        np.save(folder / f"{name}.npy", array)
        return texts

    assert "group_offset.npy: group 1 cannot begin at byte 500" in resealed("group_offset", lambda a: put(a, 1, 500))[0]
    assert "group_offset.npy: group 3 cannot begin at byte 512" in resealed("group_offset", lambda a: put(a, 3, 512))[0]
    assert "group_offset.npy says 512" in resealed("group_offset", lambda a: put(a, 1, 512))[0]
    assert "group_regions.npy says 99" in resealed("group_regions", lambda a: put(a, 5, 99))[0]
    assert "the pair arrays say" in resealed("pair_length", lambda a: put(a, 0, 50))[0]
    assert resealed("pair_slot", lambda a: put(a, 0, 5)) == [
        "pair_group.npy: pairs are not numbered group by group, text by text"
    ]
    assert resealed("group_shard", lambda a: put(a, 0, 1)) == [
        "group_shard.npy: does not follow the shards' group counts"
    ]
    assert "pair_id.npy: 't000001' is the id of several texts" in resealed("pair_id", lambda a: put(a, 0, a[1]))
    assert "group_regions.npy: 5 entries, but manifest.json counts 6" in resealed("group_regions", lambda a: a[:-1])[0]


def test_stray_tars_and_a_wrong_vocabulary_are_violations(folder):
    shutil.copy(folder / "shard-000000.tar", folder / "shard-000007.tar")
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text() + "more\n")
    seal(folder)
    report = verify(folder)
    assert [problem.file for problem in report.problems] == ["vocab.txt", "shard-000007.tar"]
    assert "the manifest says Vocabulary(size=64" in report.problems[0].text
    with pytest.raises(DataError, match=r"vocab\.txt"):
        report.check()


@pytest.mark.parametrize("name", ["group_largest", "pair_answer", "pair_rationale"])
def test_lengths_that_only_some_sets_tell(tmp_path: Path, name: str) -> None:
    make_task_shards(tmp_path / "set", "vcr", groups=4)
    assert json.loads((tmp_path / "set" / "manifest.json").read_text())["schema"] == 2
    assert not verify(tmp_path / "set").problems
    array = np.load(tmp_path / "set" / f"{name}.npy")
    array[2] += 1
    (tmp_path / "set" / f"{name}.npy").write_bytes(npy.encode(array))
    seal(tmp_path / "set")
    (problem,) = verify(tmp_path / "set").problems
    assert f"{name}.npy says" in problem.text
