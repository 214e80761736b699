"""rebuild-manifest: tars that lost their manifest, or were written by others."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.shards import make_pieces, make_shards
from villa_ds.cli import main
from villa_ds.data import npy
from villa_ds.data.manifest import load_manifest
from villa_ds.data.rebuild import SHOWN, NoSetError, rebuild_manifest
from villa_ds.data.verify import verify
from villa_ds.errors import DataError


def lose_manifest(folder: Path) -> dict[str, bytes]:
    """Delete all but the tars and the vocabulary; what was there."""
    lost = {}
    for name in ("manifest.json", *(path.name for path in folder.glob("*.npy"))):
        lost[name] = (folder / name).read_bytes()
        (folder / name).unlink()
    return lost


@pytest.mark.parametrize(
    "settings", [{}, {"label_format": "topk", "images_per_group": 2}, {"classes": 0, "answers": 0}]
)
def test_a_rebuilt_manifest_equals_the_lost_one(tmp_path, settings):
    before = make_shards(tmp_path, groups=7, shards=3, **settings)
    lost = lose_manifest(tmp_path)
    rebuild_manifest(
        tmp_path,
        make_pieces(),
        answers=before.answers,
        detector_classes=before.detector_classes if before.label_format == "topk" else 0,
        extractor=before.extractor,
        source=before.source,
        command=before.command,
        processes=1,
    )
    assert len(lost) >= 8
    for name, content in lost.items():
        assert (tmp_path / name).read_bytes() == content, name


def test_as_typed(tmp_path, capsys):
    before = make_shards(tmp_path / "set", groups=4, shards=2)
    (tmp_path / "answers.json").write_text(json.dumps(before.answers))
    command = ["shards", "rebuild-manifest", str(tmp_path / "set"), "--answers", str(tmp_path / "answers.json")]
    assert main(command) == 2
    assert "manifest.json: is there; check it with `shards verify`, or delete it first" in capsys.readouterr().err
    lose_manifest(tmp_path / "set")
    assert main([*command, "--extractor", before.extractor, "--source", before.source]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: {before.num_pairs} pairs, 4 groups, 2 shards\n"
    after = load_manifest(tmp_path / "set")
    assert after.fingerprint == before.fingerprint
    assert after.command == f"villa-ds {' '.join([*command, '--extractor'])} 'random numbers' --source '{after.source}'"


def foreign(path: Path, groups: int = 3, change=lambda key, members: members) -> None:
    """A tar as another program writes it: PAX headers, times, owners, and members in another order."""
    rng = np.random.default_rng(1)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(groups):
            key = f"{path.stem}_{number}"
            record = {
                "images": [{"name": f"{key}.jpg", "start": 0, "stop": 2}],
                "texts": [{"id": f"{key}#0", "text": "word3", "word_pieces": [9, 8], "target": {}, "extra": 1}],
            }
            members = {
                "json": json.dumps(record, indent=1).encode(),
                "features.npy": npy.encode(rng.normal(size=(2, 5)).astype(np.float16)),
                "boxes.npy": npy.encode(np.array([[0, 0, 1, 1, 1, 1, 1]] * 2, np.float32)),
            }
            for extension, content in change(key, members).items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size, header.mtime, header.uname = len(content), 1234567890.5, "ärger"
                archive.addfile(header, io.BytesIO(content))


def rebuild(folder: Path, **settings):
    return rebuild_manifest(
        folder, make_pieces(), **{"extractor": "e", "source": "s", "command": "c", "processes": 1, **settings}
    )


def test_tars_of_another_writer_become_a_set(tmp_path):
    for name in ("b", "a"):
        foreign(tmp_path / f"{name}.tar")
    manifest = rebuild(tmp_path)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "b.tar"]
    assert (manifest.feature_width, manifest.label_format, manifest.num_groups) == (5, "none", 6)
    assert manifest.index["pair_id"].tolist()[:2] == [b"a_0#0", b"a_1#0"]
    verify(tmp_path).check()


def test_all_problems_are_listed_and_nothing_is_written(tmp_path, capsys):
    def spoil(key, members):
        if key == "a_1":
            return {**members, "boxes.npy": npy.encode(np.ones((2, 7), np.float32) * 3)}
        if key == "a_2":
            return {name: content for name, content in members.items() if name != "json"}
        return members

    foreign(tmp_path / "a.tar", change=spoil)
    foreign(tmp_path / "b.tar", change=lambda key, members: {**members, "features.npy": b"\x80\x04K\x01."})
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "d.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(
        NoSetError, match=r"9 problems, first: a\.tar: group 'a_1': box 0 is .*; mend the tars, or"
    ) as e:
        rebuild(tmp_path)
    lines = e.value.listing.splitlines()
    assert len(lines) == 9
    assert lines[1] == "a.tar: group 'a_2': has the members ['boxes.npy', 'features.npy'], expected " + str(
        ["boxes.npy", "features.npy", "json"]
    )
    assert all(f"b.tar: group 'b_{number}': features.npy cannot be" in lines[2 + number] for number in range(3))
    assert "c.tar: group 'a_0': the key occurs twice" in lines
    assert lines[-1].startswith("d.tar: not a readable tar after 0 groups")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar", "d.tar"]
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in make_pieces()))
    assert main(["shards", "rebuild-manifest", str(tmp_path), "--processes", "1"]) == 2
    assert capsys.readouterr().out.splitlines() == lines


def test_a_long_list_is_cut(tmp_path):
    foreign(tmp_path / "a.tar", 1)
    foreign(tmp_path / "b.tar", SHOWN + 7, lambda key, members: {"json": members["json"]})
    with pytest.raises(NoSetError) as e:
        rebuild(tmp_path)
    assert e.value.total == SHOWN + 7
    assert e.value.listing.splitlines()[SHOWN:] == ["... and 7 more"]


def test_what_cannot_begin_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"no file that ends in \.tar"):
        rebuild(tmp_path)
    foreign(tmp_path / "a.tar")
    (tmp_path / "vocab.txt").write_text("other\n")
    with pytest.raises(DataError, match=r"vocab\.txt: not the vocabulary given"):
        rebuild(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "b.tar.partial").touch()
    with pytest.raises(DataError, match=r"b\.tar\.partial: a shard that was not finished"):
        rebuild(tmp_path)
    (tmp_path / "b.tar.partial").unlink()
    (tmp_path / "a b.tar").touch()
    with pytest.raises(DataError, match=r"a b\.tar: a shard's name has letters"):
        rebuild(tmp_path)
    (tmp_path / "a b.tar").unlink()
    labels = npy.encode(np.array([[[1, 1.0]]] * 2, np.float32))
    foreign(tmp_path / "a.tar", change=lambda key, members: {**members, "labels.npy": labels})
    with pytest.raises(DataError, match="does not tell the number of classes: give --detector-classes"):
        rebuild(tmp_path)
    assert rebuild(tmp_path, detector_classes=4).label_format == "topk"
