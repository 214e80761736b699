"""Recipes and DeepSpeed configurations that ship: in a checkout as they lie, in a wheel as package data."""

from pathlib import Path

from villa_ds.errors import ConfigError

_PACKAGE = Path(__file__).parent


def find_recipe(name: str) -> Path:
    """A recipe file: the path `name` itself, or a shipped recipe by its name, with or without ``.yaml``.

    Raises ConfigError with the shipped names if there is neither.
    """
    return _find("recipe", name, ".yaml", (_PACKAGE.parent / "launch" / "recipes", _PACKAGE / "_recipes"))


def find_ds_config(name: str) -> Path:
    """A DeepSpeed configuration: the path `name` itself, or a shipped one by its name, with or without ``.json``.

    Raises ConfigError with the shipped names if there is neither.
    """
    return _find("engine.ds_config", name, ".json", (_PACKAGE.parent / "ds_configs", _PACKAGE / "_ds_configs"))


def _find(key: str, name: str, suffix: str, folders: tuple[Path, ...]) -> Path:
    candidates = [Path(name), *(folder / f"{name.removesuffix(suffix)}{suffix}" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({path.stem for folder in folders for path in folder.glob(f"*{suffix}")})
    raise ConfigError(f"{key}: {name!r} is neither a file nor one that ships: {', '.join(shipped) or 'none'}")
