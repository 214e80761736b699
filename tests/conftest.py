"""Applies to all tests."""

import logging
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from villa_ds.data.manifest import Manifest


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start: after `make test &` in a script it is ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def whole_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Manifest]]:
    """All of `villa-ds shards demo --benchmark`, made once (two minutes): its folder, and its manifests by set."""
    from villa_ds.data.convert.benchmark import demo_with_benchmark

    folder = tmp_path_factory.mktemp("demo") / "shards"
    return folder, demo_with_benchmark(folder)


@pytest.fixture(scope="session")
def small_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `villa-ds shards demo --benchmark --images 80`, made once (some seconds)."""
    from villa_ds.data.convert.benchmark import demo_with_benchmark

    folder = tmp_path_factory.mktemp("benchmark") / "out"
    demo_with_benchmark(folder, images=80, processes=1)
    return folder


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A run takes over the package's logger; the next test must see the one it started with."""
    logger = logging.getLogger("villa_ds")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
