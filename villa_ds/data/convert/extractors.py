"""Which extractor of regions: one that is stored, built in, or of another package."""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from villa_ds.data.convert.extractor import RegionExtractor
from villa_ds.errors import ConfigError
from villa_ds.mapping import apply_override, from_mapping

if TYPE_CHECKING:
    from villa_ds.data.convert.regions import PixelRegionExtractor

STORED_SUFFIX = ".npz"
ENTRY_POINTS = "villa_ds.extractors"  # where packages name theirs: a function of the settings
PIXELS, FASTER_RCNN = "pixels", "faster-rcnn"


def load_extractor(name: str, settings: Sequence[str] = ()) -> RegionExtractor:
    """The extractor called `name`, with settings given as ``key=value``, the values YAML.

    `name` is a stored one's file (`.npz`), `pixels`, `faster-rcnn`, an entry point of `villa_ds.extractors`, or
    `module:function`; the latter two are called with the settings as keyword arguments. Code of another package runs
    only when the user names it here: no file of this project ever does. ConfigError or DataError say what is wrong.
    """
    if name.endswith(STORED_SUFFIX):
        if settings:
            raise ConfigError(f"{name}: a stored extractor has its settings in it; leave out {', '.join(settings)}")
        return stored_extractor(Path(name))
    if name == PIXELS:
        return pixel_extractor(settings)
    if name == FASTER_RCNN:
        from villa_ds.data.convert.faster_rcnn import FasterRcnnExtractor, FasterRcnnSettings  # noqa: PLC0415

        return FasterRcnnExtractor(from_mapping(FasterRcnnSettings, _read(settings), FASTER_RCNN))
    return _made_elsewhere(name, _read(settings))


def pixel_extractor(settings: Sequence[str] = ()) -> "PixelRegionExtractor":
    """The built-in extractor, without a codebook; settings as in `load_extractor`."""
    from villa_ds.data.convert.regions import PixelRegionExtractor, PixelSettings  # noqa: PLC0415

    return PixelRegionExtractor(from_mapping(PixelSettings, _read(settings), PIXELS))


def stored_extractor(path: Path) -> "PixelRegionExtractor":
    """The built-in extractor that is stored in a file."""
    from villa_ds.data.convert.regions import PixelRegionExtractor  # noqa: PLC0415

    return PixelRegionExtractor.load(path)


def _read(settings: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        apply_override(values, setting)
    return values


def _made_elsewhere(name: str, settings: Mapping[str, Any]) -> RegionExtractor:
    try:
        made = _factory(name)(**settings)
    except TypeError as error:  # a setting that it does not have, most likely
        raise ConfigError(f"extractor {name!r}: {error}; give its settings with --set KEY=VALUE") from None
    if not isinstance(made, RegionExtractor):
        raise ConfigError(
            f"extractor {name!r} made a {type(made).__name__}, which is none: it needs feature_width, "
            "detector_classes, fingerprint and extract(image)"
        )
    return made


def _factory(name: str) -> Callable[..., object]:
    points = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    module, colon, attribute = points.get(name, name).partition(":")
    if not colon:
        known = ", ".join([PIXELS, FASTER_RCNN, *sorted(points)])
        raise ConfigError(
            f"extractor {name!r} is none of {known}; give one, a stored {STORED_SUFFIX}, or module:function"
        )
    try:
        found: Callable[..., object] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"extractor {name!r} cannot be imported: {error}; is its package installed?") from None
    return found
