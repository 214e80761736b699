"""Shipped recipes and DeepSpeed configurations are found in a checkout and in an installed wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from villa_ds import resources
from villa_ds.errors import ConfigError
from villa_ds.resources import find_ds_config, find_recipe

ROOT = Path(__file__).parents[2]
KINDS = [(find_recipe, "launch/recipes", "_recipes", "yaml"), (find_ds_config, "ds_configs", "_ds_configs", "json")]
Find = Callable[[str], Path]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the package (only in name) and, so far, nothing that ships."""
    (tmp_path / "villa_ds").mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "villa_ds")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("find", "checkout", "packaged", "suffix"), KINDS)
def test_path_then_checkout_then_package(find: Find, checkout: str, packaged: str, suffix: str, layout: Path) -> None:
    places = [layout / "villa_ds" / packaged, layout / checkout, layout]
    for folder in places:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"one.{suffix}").write_text("")
        found = find(f"one.{suffix}")
        assert found.resolve() == folder / f"one.{suffix}"
        assert find(str(folder / f"one.{suffix}")) == folder / f"one.{suffix}"
    # without suffix only what ships is meant
    assert find("one") == layout / checkout / f"one.{suffix}"


@pytest.mark.parametrize(("find", "checkout", "packaged", "suffix"), KINDS)
def test_message_lists_what_ships(find: Find, checkout: str, packaged: str, suffix: str, layout: Path) -> None:
    with pytest.raises(ConfigError, match="'nine' is neither a file nor one that ships: none"):
        find("nine")
    for folder, name in [(layout / checkout, "b"), (layout / "villa_ds" / packaged, "a")]:
        folder.mkdir(parents=True)
        (folder / f"{name}.{suffix}").write_text("")
    with pytest.raises(ConfigError, match=r"'nine' is neither a file nor one that ships: a, b$"):
        find("nine")
    with pytest.raises(ConfigError, match="neither a file"):
        find(".")  # a folder


@pytest.mark.slow
def test_wheel_carries_what_ships(tmp_path: Path) -> None:
    tree, wheels, target = tmp_path / "tree", tmp_path / "wheels", tmp_path / "site"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("villa_ds", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, tree], check=True)
    (wheel,) = wheels.glob("villa_ds-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "villa-ds = villa_ds.cli:program" in archive.read(entry_points).decode()
        for source, folder in [("launch/recipes", "_recipes"), ("ds_configs", "_ds_configs")]:
            for path in (ROOT / source).iterdir():
                assert archive.read(f"villa_ds/{folder}/{path.name}") == path.read_bytes()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "villa_ds").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "villa_ds/py.typed" in names

    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    recipe = next((ROOT / "launch" / "recipes").glob("*.yaml")).stem
    code = f"from villa_ds.resources import find_recipe; print(find_recipe({recipe!r}))"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found == str(target / "villa_ds" / "_recipes" / f"{recipe}.yaml")
