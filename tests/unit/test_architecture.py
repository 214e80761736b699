"""The layering of the package: a file imports only from files above it, and some things occur nowhere.

`ORDER` is the list. A new file goes into it, below everything that it imports; files of a pattern row (converters,
backbones, objectives, analyses) need no line of their own and know nothing of each other.
"""

import ast
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "villa_ds"
ORDER = (
    "__init__",
    "data.__init__",
    "data.convert.__init__",
    "train.__init__",
    "analysis.__init__",
    "errors",
    "files",
    "mapping",
    "config_objectives",
    "config",
    "resources",
    "rng",
    "tensor_files",
    "pictures",
    "batch",
    "data.contract",
    "data.npy",
    "data.cache",
    "data.checked",
    "data.transport",
    "data.store",
    "data.manifest",
    "data.order",
    "data.wordpiece",
    "data.sizes",
    "data.writer",
    "data.progress",
    "data.processes",
    "data.stored",
    "data.verify",
    "data.rebuild",
    "data.convert.statements",
    "data.convert.scenes",
    "data.convert.scene_texts",
    "data.convert.descriptors",
    "data.convert.codebook",
    "data.convert.account",
    "data.convert.extractor",
    "data.convert.regions",
    "data.convert.json_files",
    "data.convert.identity",
    "data.convert.exclusions",
    "data.convert.settings",
    "data.convert.easy_vqa",
    "data.convert.region_files",
    "data.convert.sources",
    "data.convert.assemble",
    "data.convert.journal",
    "data.convert.join",
    "data.convert.jsonl",
    "data.convert.spool",
    "data.convert.captions",
    "data.convert.columns",
    "data.convert.texts",
    "data.convert.uniter_images",
    "data.convert.faster_rcnn",
    "data.convert.extractors",
    "data.convert.*",
    "data.line",
    "data.packing",
    "data.recent",
    "data.quarantine",
    "data.plan",
    "data.lanes",
    "data.reader",
    "data.regroup",
    "data.statistics",
    "data.charts",
    "data.buffers",
    "data.collate",
    "data.digest",
    "data.delivery",
    "data.ahead",
    "data.loader",
    "models.presets",
    "models.backbone",
    "models.products",
    "models.layers",
    "models.*",
    "models.weights",
    "kernels",
    "models.__init__",  # imports the backbones, which register themselves
    "objectives.base",
    "objectives.reductions",
    "objectives.inputs",
    "objectives.ot",
    "objectives.heads",
    "objectives.pairs",
    "objectives.submissions",
    "objectives.answers",
    "objectives.*",
    "objectives.__init__",  # imports the objectives, which register themselves
    "train.module",
    "train.parameters",
    "train.optim",
    "train.adversary",
    "train.torch_engine",
    "train.ending",
    "train.engine",
    "train.checkpoint",
    "train.state",
    "train.metrics",
    "train.step",
    "train.evaluate",
    "train.ensemble",
    "train.gallery",
    "train.rundir",
    "train.signals",
    "train.watch",
    "train.lock",
    "train.stability",
    "train.quarantine",
    "train.session",
    "train.predict",
    "train.loop",
    "analysis.intervals",
    "analysis.page",
    "analysis.table",
    "analysis.runs",
    "analysis.known",
    "analysis.attention",
    "analysis.curves",
    "analysis.maps",
    "analysis.probing",
    "analysis.rephrasing",
    "analysis.looking",
    "analysis.numbers",
    "analysis.report",
    "analysis.*",
    "doctor",
    "trace",
    "predict",
    "estimate",
    "cli_shards",
    "cli",
    "__main__",
)
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; ``__init__`` stays in the name."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def rank(module: str) -> int | None:
    """The row of `ORDER`: a row of its own before a pattern; None if there is neither."""
    if module in ORDER:
        return ORDER.index(module)
    return next((row for row, pattern in enumerate(ORDER) if fnmatchcase(module, pattern)), None)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that is imported anywhere in a file, by statement or by function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = ["villa_ds", *module.split(".")[:-1]]
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            prefix = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def name_of(function: ast.expr) -> str:
    """The last part of what is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def own_module(target: str, known: Iterable[str]) -> str | None:
    """The module of this package that an imported name belongs to, the longest that fits; None for other packages."""
    parts = target.split(".")
    if parts[0] != "villa_ds":
        return None
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[1:end])
        for candidate in (name, f"{name}.__init__" if name else "__init__"):
            if candidate in known:
                return candidate
    return None


def layering_errors(module: str, source: str, known: Iterable[str]) -> list[str]:
    """What one file imports against the order."""
    own_rank = rank(module)
    if own_rank is None:
        return [f"{module} is not in ORDER: add it below everything that it imports (see the docstring of this test)"]
    errors = []
    for line, target in imports(ast.parse(source), module):
        other = own_module(target, known)
        other_rank = None if other is None else rank(other)
        if other_rank is not None and other_rank >= own_rank and other != module:
            errors.append(f"{module}:{line} imports {other}, which is not above it")
        if target.split(".")[0] == "deepspeed" and module != "train.engine":
            errors.append(f"{module}:{line} imports deepspeed: only train.engine does")
    return errors


def forbidden(module: str, source: str) -> list[str]:
    """Ways to run code that comes from a file: pickle, eval, unchecked loading."""
    tree = ast.parse(source)
    errors = [
        f"{module}:{line} imports {target}"
        for line, target in imports(tree, module)
        if target.split(".")[0] in PICKLING
    ]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        settings = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec"):
            errors.append(f"{module}:{call.lineno} calls {call.func.id}")
        if settings.get("allow_pickle") is True:
            errors.append(f"{module}:{call.lineno} passes allow_pickle=True")
        # explicit, since the default differs between the versions of torch that are supported
        if ast.unparse(call.func) == "torch.load" and settings.get("weights_only") is not True:
            errors.append(f"{module}:{call.lineno} calls torch.load without weights_only=True")
        elif settings.get("weights_only") is False:
            errors.append(f"{module}:{call.lineno} passes weights_only=False")
    return errors


def test_files_import_only_from_above() -> None:
    known = modules()
    errors = [error for name, path in known.items() for error in layering_errors(name, path.read_text(), known)]
    assert not errors, "\n".join(errors)


def test_nothing_runs_code_from_files() -> None:
    errors = [error for name, path in modules().items() for error in forbidden(name, path.read_text())]
    assert not errors, "\n".join(errors)


def test_models_know_nothing_of_the_adversary() -> None:
    for path in (PACKAGE / "models").rglob("*.py"):
        assert "adv" not in path.name.lower()
        lines = [
            f"{path.name}:{n} {line}"
            for n, line in enumerate(path.read_text().splitlines(), 1)
            if "adv" in line.lower()
        ]
        assert not lines, "\n".join(lines)


KNOWN = (
    "__init__",
    "errors",
    "config",
    "rng",
    "models.__init__",
    "models.uniter",
    "models.lxmert",
    "train.engine",
    "cli",
)


@pytest.mark.parametrize(
    ("module", "source", "culprit"),
    [
        ("config", "import villa_ds.rng", "config:1 imports rng"),
        ("config", "from villa_ds.rng import Stream", "config:1 imports rng"),
        ("config", "from villa_ds import errors, rng", "config:1 imports rng"),
        ("config", "def late():\n    from villa_ds.train.engine import Engine", "config:2 imports train.engine"),
        ("config", "from . import rng", "config:1 imports rng"),
        ("models.uniter", "from ..train.engine import Engine", "models.uniter:1 imports train.engine"),
        ("models.uniter", "from .lxmert import Lxmert", "models.uniter:1 imports models.lxmert"),
        ("models.uniter", "from villa_ds import models", "models.uniter:1 imports models.__init__"),
        ("models.uniter", "from villa_ds.models import register", "models.uniter:1 imports models.__init__"),
        ("config", "import importlib\nimportlib.import_module('villa_ds.rng')", "config:2 imports rng"),
        ("__init__", "from villa_ds.errors import VillaError", "__init__:1 imports errors"),
        ("cli", "import deepspeed.comm", "cli:1 imports deepspeed: only train.engine does"),
        ("cli", "def late():\n    from deepspeed import zero", "cli:2 imports deepspeed"),
        ("data.extra", "", "data.extra is not in ORDER"),
    ],
)
def test_the_layering_check_finds(module: str, source: str, culprit: str) -> None:
    (error,) = layering_errors(module, source, KNOWN)
    assert error.startswith(culprit)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli", "from villa_ds import __version__\nfrom villa_ds.config import Recipe\nimport torch"),
        ("models.uniter", "from ..errors import ConfigError\nfrom villa_ds import rng"),
        ("models.__init__", "from villa_ds.models import lxmert, uniter"),
        ("train.engine", "import deepspeed\nimport villa_ds.models.uniter"),
    ],
)
def test_the_layering_check_lets_pass(module: str, source: str) -> None:
    assert layering_errors(module, source, KNOWN) == []


@pytest.mark.parametrize(
    ("source", "culprit"),
    [
        ("import pickle", "m:1 imports pickle"),
        ("def late():\n    from dill import load", "m:2 imports dill"),
        ("eval('1')", "m:1 calls eval"),
        ("import torch\ntorch.load(path)", "m:2 calls torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "m:1 calls torch.load without weights_only=True"),
        ("engine.load_checkpoint(path, weights_only=False)", "m:1 passes weights_only=False"),
        ("np.load(path, allow_pickle=True)", "m:1 passes allow_pickle=True"),
    ],
)
def test_the_code_check_finds(source: str, culprit: str) -> None:
    assert culprit in " ".join(forbidden("m", source))


def test_the_code_check_lets_pass() -> None:
    source = "model.eval()\ntorch.load(p, weights_only=True)\nnp.load(p, allow_pickle=False)"
    assert forbidden("m", source) == []
