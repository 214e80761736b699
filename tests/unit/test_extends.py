"""Recipes that say only what differs from another."""

from pathlib import Path

import pytest

from villa_ds.errors import ConfigError
from villa_ds.mapping import read_yaml


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def test_mappings_are_merged_and_the_rest_replaced(tmp_path: Path) -> None:
    write(
        tmp_path,
        base="a: {x: 1, y: {z: 2}}\nlist: [1, 2]\ngone: 3\nkept: 4\n",
        middle="extends: base\na: {y: {w: 5}}\nlist: [6]\n",
        top="extends: middle\na: {x: 7}\ngone: null\n",
    )
    merged = {"a": {"x": 7, "y": {"z": 2, "w": 5}}, "list": [6], "kept": 4}
    assert read_yaml(tmp_path / "top.yaml") == merged
    assert read_yaml(tmp_path / "top.yaml", ["a.y.z=8"])["a"]["y"] == {"z": 8, "w": 5}
    assert read_yaml(tmp_path / "base.yaml")["gone"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: there\n", r"there\.yaml: cannot be read"),
        ("extends: ../there\n", r"extends: '\.\./there' does not do: give the name of a recipe in the same folder"),
        ("extends: [a]\n", r"extends: \['a'\] does not do"),
        ("extends: own\n", r"extends: own -> own goes round in a circle"),
        ("extends: back\n", r"extends: own -> back -> own goes round in a circle"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, own=text, back="extends: own\n")
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "own.yaml")
