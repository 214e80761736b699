"""Dataclasses from and to plain mappings, and mappings from YAML with ``dotted.key=value`` overrides.

Everything that does not fit is a `ConfigError` with the dotted key. A dataclass checks its own values in
``__post_init__`` with `require`, whose keys are relative to it; `from_mapping` puts the path in front.
"""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from villa_ds.errors import ConfigError

T = TypeVar("T")
_BOOLEAN = "tag:yaml.org,2002:bool"
_MOST_NODES = 100_000  # of a recipe; anchors within anchors grow without bound
_LARGEST_INT = 2**63 - 1  # what arrays, files and processes count with
_LARGEST_FLOAT = 3.4e38  # what the 32 bits of a tensor's numbers hold


class _Loader(yaml.SafeLoader):
    """Plain values, and of booleans only true and false, as YAML 1.2 has it: in 1.1 `off` and `no` are no words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _load(text: str) -> Any:
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def require(condition: bool, key: str, value: object, mend: str) -> None:
    """Raise a ConfigError about the field `key` unless `condition`."""
    if not condition:
        raise ConfigError(f"{key}: {value!r} does not do: {mend}")


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with the overrides (whose values are YAML) applied in order.

    With the key ``extends`` the file says what differs from the file of that name (without ``.yaml``) beside it:
    mappings are merged key by key, with null a key is taken away, anything else replaces what was there. Raises
    ConfigError if a file is not readable, not YAML, not a mapping, gives a key twice, or extends itself.
    """
    mapping = _extended(Path(path), ())
    for override in overrides:
        apply_override(mapping, override)
    return mapping


def _extended(path: Path, below: tuple[str, ...]) -> dict[str, Any]:
    """The mapping in a file, laid over that of the file which it extends; `below`: the names that led here."""
    mapping = _read_mapping(path)
    base = mapping.pop("extends", None)
    if base is None:
        return mapping
    if not isinstance(base, str) or Path(base).name != base:
        raise ConfigError(f"{path}: extends: {base!r} does not do: give the name of a recipe in the same folder")
    if base in below or base == path.stem:
        raise ConfigError(f"{path}: extends: {' -> '.join((*below, path.stem, base))} goes round in a circle")
    return _laid_over(_extended(path.with_name(f"{base}.yaml"), (*below, path.stem)), mapping)


def _laid_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _laid_over(merged[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text, byte {error.start} is {error.object[error.start]:#04x}") from None
    try:
        root = yaml.compose(text, _Loader)
        if root is not None and _spelt_out(root, {}) > _MOST_NODES:
            raise ConfigError(f"{path}: its anchors stand for more than {_MOST_NODES} values; write them out")
        _refuse_repeated_keys(root, "")
        mapping = to_mapping(_load(text))  # a copy without YAML's sharing: an override reaches one place only
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: of a date that does not exist
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return mapping


def to_mapping(value: Any) -> Any:
    """Plain dicts, lists and scalars of a dataclass or of anything made of mappings and sequences."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_mapping(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_mapping(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return value


def from_mapping(cls: type[T], mapping: object, path: str) -> T:
    """Build the dataclass `cls` from a mapping; `path` is the dotted key of the mapping, for messages."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{path or 'recipe'}: expected keys and values, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for key in mapping:
        if key not in hints:
            raise ConfigError(f"{_join(path, str(key))}: unknown key; known here: {', '.join(f.name for f in fields)}")
    for item in fields:
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if item.name not in mapping and not optional:
            raise ConfigError(f"{_join(path, item.name)}: missing, give it a value")
    values = {key: _convert(hints[key], value, _join(path, key)) for key, value in mapping.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # of the class's own checks
        raise ConfigError(_join(path, str(error))) from None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _spelt_out(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Values that a YAML node stands for with its anchors resolved; endless where one refers to itself."""
    if node not in known:
        known[node] = math.inf  # while it is being counted
        if isinstance(node, yaml.MappingNode):
            known[node] = 1 + sum(_spelt_out(part, known) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            known[node] = 1 + sum(_spelt_out(part, known) for part in node.value)
        else:
            known[node] = 1
    return known[node]


def _refuse_repeated_keys(node: yaml.Node | None, path: str) -> None:
    """YAML's loader would let the last of two equal keys win in silence."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_repeated_keys(item, _join(path, str(index)))
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        for key, (_, item) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise ConfigError(f"{_join(path, key)}: given {keys.count(key)} times, keep one")
            _refuse_repeated_keys(item, _join(path, key))


def apply_override(mapping: dict[str, Any], override: str) -> None:
    """Set what ``dotted.key=value`` says, the value as YAML. ConfigError if it has another form or no place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r}: an override has the form dotted.key=value")
    *parents, last = key.split(".")
    node: Any = mapping
    for parent in parents:
        if isinstance(node, list):
            node = node[_position(node, parent, key)]
        else:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{key}: {parent} is {node!r}, not a group of keys")
    try:
        value = _load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{key}: {text!r} is not YAML") from None
    node[_position(node, last, key) if isinstance(node, list) else last] = value


def _position(node: list[Any], index: str, key: str) -> int:
    if not index.isdecimal() or int(index) >= len(node):
        raise ConfigError(f"{key}: {index!r} is not one of the {len(node)} list elements, counted from 0")
    return int(index)


def _convert(hint: Any, value: object, path: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # of one type and None
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _convert(inner, value, path)
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, path)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is not None and origin is not Literal and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected keys and values, got {value!r}")
        return {str(key): _convert(arguments[1], item, _join(path, str(key))) for key, item in value.items()}
    if origin is Literal and not any(value == one and type(value) is type(one) for one in arguments):
        raise ConfigError(f"{path}: {value!r} is not one of {', '.join(map(str, arguments))}")
    return value if origin is Literal else _convert_scalar(hint, value, path)


def _convert_tuple(arguments: tuple[Any, ...], value: object, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path}: expected a list, got {value!r}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = arguments[:1] * len(value)
    if len(value) != len(arguments):
        raise ConfigError(f"{path}: expected {len(arguments)} values, got {len(value)}: {value!r}")
    return tuple(
        _convert(argument, item, _join(path, str(index)))
        for index, (argument, item) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_scalar(hint: type, value: object, path: str) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value, number = float(value), True
    if (hint is float and number) or type(value) is hint is int:
        largest = _LARGEST_FLOAT if hint is float else _LARGEST_INT
        if not abs(typing.cast(float, value)) <= largest:
            raise ConfigError(f"{path}: {value!r} does not do: give a finite number, at most {largest}")
        return float(typing.cast(float, value)) if hint is float else value
    if type(value) is hint:
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
