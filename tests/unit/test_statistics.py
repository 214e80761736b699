"""`shards stat`: tables, JSON and pictures."""

import io
import json
import math
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image as Picture

from tests.shards import make_shards
from villa_ds.cli import main
from villa_ds.data.charts import draw
from villa_ds.data.statistics import BINS, stat
from villa_ds.errors import ConfigError

PERCENTS = (0, 5, 50, 95, 99, 100)
PICTURES = ["labels.png", "regions.png", "text_lengths.png", "texts.png", "token_budget.png", "vocabulary.png"]


def test_lengths_and_the_rest(tmp_path):
    manifest = make_shards(tmp_path / "set", groups=40, shards=4, texts_per_group=2)
    found = stat(tmp_path / "set")
    lengths, regions = manifest.index["pair_length"], manifest.index["group_regions"]
    texts = np.bincount(manifest.index["pair_group"])
    joint = lengths + regions[manifest.index["pair_group"]] + 2
    for name, values in (
        ("word pieces a text", lengths),
        ("regions a group", regions),
        ("texts a group", texts),
        ("joint length a pair", joint),
    ):
        distribution = found.lengths[name]
        expected = np.percentile(values, PERCENTS, method="nearest")
        assert [distribution.percentile(percent) for percent in PERCENTS] == expected.tolist()
        assert distribution.mean == pytest.approx(values.mean())
        assert distribution.counts.tolist() == np.bincount(values).tolist()
    assert found.sampled == 40
    pieces, labels = [], []
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "set" / shard.name) as archive:
            for member in archive:
                content = archive.extractfile(member).read()
                if member.name.endswith("json"):
                    pieces += [piece for text in json.loads(content)["texts"] for piece in text["word_pieces"]]
                elif member.name.endswith("labels.npy"):
                    labels.append(np.load(io.BytesIO(content)).astype(np.float64))
    rows = np.concatenate(labels)
    entropies = -(rows * np.log(np.maximum(rows, 1e-12))).sum(axis=1)
    assert found.pieces.tolist() == np.bincount(pieces, minlength=64).tolist()
    assert found.used_pieces == len(set(pieces))
    assert found.unknown == 0
    assert found.labels.entropy == pytest.approx(entropies.mean())
    assert found.labels.entropy_counts.tolist() == np.histogram(entropies, BINS, (0, math.log(7)))[0].tolist()
    assert found.labels.background == pytest.approx(rows[:, 0].mean())
    assert found.labels.background_counts.sum() == len(rows)
    table = str(found)
    assert f"pairs {manifest.num_pairs}, groups 40, shards 4" in table
    assert manifest.fingerprint in table


def test_budgets_are_those_of_the_packing(tmp_path):
    manifest = make_shards(tmp_path / "set", groups=30, shards=1)
    found = stat(tmp_path / "set", groups=7)
    assert found.sampled == 7
    joint = np.sort(manifest.index["pair_length"] + manifest.index["group_regions"][manifest.index["pair_group"]] + 2)
    assert found.packed == len(joint)
    largest = found.budgets[-1]  # 32,768 tokens take all pairs at once
    assert (largest.tokens, largest.rows) == (32768, len(joint))
    assert largest.padding == pytest.approx(1 - joint.sum() / (joint[-1] * len(joint)))
    assert all(budget.padding < largest.padding for budget in found.budgets[:2])
    assert found.budgets[0].tokens == 256


def test_json_and_pictures_as_typed(tmp_path, capsys):
    manifest = make_shards(tmp_path / "set", groups=12, shards=2)
    assert main(["shards", "stat", str(tmp_path / "set"), "--json", "--plots", str(tmp_path / "a")]) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert figures["fingerprint"] == manifest.fingerprint
    assert figures["lengths"]["regions a group"]["counts"] == [
        [value, count] for value, count in enumerate(np.bincount(manifest.index["group_regions"]).tolist()) if count
    ]
    assert sum(figures["vocabulary"]["counts_by_rank"]) == manifest.index["pair_length"].sum()
    assert figures["labels"]["entropy_limit"] == pytest.approx(math.log(7))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == PICTURES
    assert sorted(captured.err.split()) == [str(tmp_path / "a" / name) for name in PICTURES]
    for name in PICTURES:
        with Picture.open(tmp_path / "a" / name) as picture:
            panels = {"labels.png": 2, "token_budget.png": 3}.get(name, 1)
            assert picture.size[0] == 960 * panels
            image = np.asarray(picture.convert("RGB"))
        assert (image == (0x00, 0x72, 0xB2)).all(axis=2).sum() > 500  # drawn in the palette's first colour
        edge = np.concatenate([image[[0, -1]].reshape(-1, 3), image[:, [0, -1]].reshape(-1, 3)])
        assert (edge == 255).all()  # nothing is cut off


def test_a_set_without_labels(tmp_path):
    make_shards(tmp_path / "bare", groups=3, shards=1, classes=0)
    found = stat(tmp_path / "bare")
    assert "labels   " not in str(found)
    assert found.as_json()["labels"] is None
    assert [path.name for path in draw(found, tmp_path / "out")] == [
        "text_lengths.png", "regions.png", "texts.png", "token_budget.png", "vocabulary.png",
    ]  # fmt: skip


def test_without_matplotlib(tmp_path, monkeypatch):
    make_shards(tmp_path / "set", groups=3, shards=1)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pictures need the package matplotlib: pip install 'villa_ds\[plots\]'"):
        draw(stat(tmp_path / "set"), tmp_path / "out")
