"""Sound checkpoints, weights and half-done conversions, and what is done with spoilt copies of them.

Each class makes its sound things once; a trial spoils a copy by a generator, uses it, and says what came of it. It
raises one of our errors, or an AssertionError where something else is used than what was saved.
"""

import contextlib
import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.features import LENIENT, fields, row, write_region_files, write_texts
from tests.fuzz.mutations import (
    Files,
    any_bytes,
    as_json,
    edit,
    read,
    reseal_checkpoints,
    spoil_checkpoint,
    spoil_conversion,
    spoil_tensors,
    write,
)
from tests.runs import differing, final_state, make_data, tiny_recipe
from villa_ds.analysis.runs import open_run
from villa_ds.config import Recipe
from villa_ds.data.convert import join
from villa_ds.data.convert.journal import JOURNAL_NAME
from villa_ds.data.convert.npz import from_npz
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.writer import ShardWriter
from villa_ds.mapping import from_mapping
from villa_ds.models.weights import initialize_from, to_reference
from villa_ds.predict import Predictor
from villa_ds.tensor_files import write_weights
from villa_ds.train.checkpoint import FOLDER, read_state, resolve_checkpoint
from villa_ds.train.loop import train
from villa_ds.train.parameters import ParameterFiles
from villa_ds.train.session import build_initial_module, load_initial_weights, open_data

STEPS = 3


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and not differing(left, right)


class Checkpoints:
    """Runs of three steps: one that is gone on with from the second, and another of another seed."""

    def __init__(self, folder: Path) -> None:
        self._data = make_data(folder / "data")
        self._place = folder / "spoilt" / "run"
        runs = []
        for seed in (10, 11):
            output = folder / f"run-{seed}"
            train(self._recipe(output, seed))
            runs.append(output)
        self._known = {
            (seed, step): final_state(output / FOLDER / f"step-{step:08d}")
            for seed, output in zip((10, 11), runs, strict=True)
            for step in range(1, STEPS + 1)
        }
        self._sound = read(runs[0])
        self._other = {
            name.removeprefix(f"{FOLDER}/"): content
            for name, content in read(runs[1]).items()
            if name.startswith(f"{FOLDER}/")
        }
        for name in [name for name in self._sound if f"step-{STEPS:08d}" in name or name == "results.json"]:
            del self._sound[name]
        self._set = open_data(self._recipe(self._place))

    def _recipe(self, output: Path, seed: int = 10) -> Recipe:
        changes: dict[str, Any] = {
            "phases": [{"name": "a", "steps": STEPS}], "checkpoints": {"every": 1, "keep_last": STEPS},
            "watch": {"timeout_s": 0}, "seed": seed, "optimizer": {"learning_rate": 0.01, "clip_norm": 1.0},
        }  # fmt: skip
        mapping = tiny_recipe(self._data, output, **changes)
        mapping["data"] = {**mapping["data"], "validation": {}}
        return from_mapping(Recipe, mapping, "")

    def trial(self, rng: random.Random) -> str:
        files = {
            name.removeprefix(f"{FOLDER}/"): content
            for name, content in self._sound.items()
            if name.startswith(f"{FOLDER}/")
        }
        for _ in range(rng.choice((1, 1, 2))):
            with contextlib.suppress(ValueError, KeyError, RecursionError):  # spoilt once already
                spoil_checkpoint(files, [self._other], rng)
        sealed = rng.random() < 0.5
        if sealed:
            reseal_checkpoints(files, rng)
        write({name: content for name, content in self._sound.items() if FOLDER not in name}, self._place)
        write(files, self._place / FOLDER)
        use = rng.choice(
            (self._resume, self._resume, self._export, self._export, self._start_from, self._look, self._ask)
        )
        return f"{use.__name__.strip('_')}{' sealed' if sealed else ''}: {use(rng, sealed)}"

    def _resume(self, _: random.Random, sealed: bool) -> str:
        """What comes out at the end is what an undisturbed run makes, wherever it was gone on from."""
        train(self._recipe(self._place))
        result = final_state(self._place)
        if not sealed:
            assert same(result, self._known[10, STEPS]), "the resumed run ends with other weights"
        return "went on"

    def _export(self, rng: random.Random, sealed: bool) -> str:
        named = rng.choice((self._place, *sorted((self._place / FOLDER).glob("step-*"))))
        folder = resolve_checkpoint(named)
        step, found = read_state(folder)["step"], final_state(folder)
        ParameterFiles(folder).state_dict()
        if not sealed:
            assert any(same(found, state) for (_, other), state in self._known.items() if other == step), (
                "other weights"
            )
        return "read"

    def _start_from(self, _: random.Random, sealed: bool) -> str:
        module = build_initial_module(self._recipe(self._place), self._set)
        load_initial_weights(module, self._place, self._set)
        if not sealed:
            found = {f"weight/{name}": value.detach() for name, value in module.named_parameters()}
            weights = [
                {name: value for name, value in state.items() if name in found} for state in self._known.values()
            ]
            assert any(same(found, state) for state in weights), "other weights"
        return "read"

    def _look(self, _: random.Random, sealed: bool) -> str:
        run = open_run(f"a={self._place}")
        run.require_fit(self._set.reference)
        run.rows()
        run.model(self._set.reference, "cpu")
        return "read"

    def _ask(self, _: random.Random, sealed: bool) -> str:
        manifest = self._set.reference
        extractor: Any = SimpleNamespace(
            fingerprint=manifest.extractor,
            feature_width=manifest.feature_width,
            detector_classes=manifest.detector_classes,
        )
        Predictor([self._place], extractor, "itm", "cpu")
        return "read"


class Weights:
    """Weights of a small model, as one file and as a BERT folder."""

    def __init__(self, folder: Path) -> None:
        self._place = folder / "spoilt"
        recipe = from_mapping(Recipe, tiny_recipe(make_data(folder / "data-of-weights"), folder / "none"), "")
        self._recipe, self._data = recipe, open_data(recipe)
        state = to_reference(build_initial_module(recipe, self._data).state_dict())
        self._files: Files = {}
        for name in ("weights.safetensors", "weights.pt"):
            write_weights(folder / name, state)
            self._files[name] = (folder / name).read_bytes()
        sizes = build_initial_module(recipe, self._data).backbone.sizes
        self._config = {
            "vocab_size": sizes.vocabulary_size, "hidden_size": sizes.hidden_size,
            "num_hidden_layers": sizes.num_hidden_layers, "num_attention_heads": sizes.num_attention_heads,
            "intermediate_size": sizes.intermediate_size, "hidden_act": "gelu",
        }  # fmt: skip
        self._words = "".join(f"{piece}\n" for piece in self._data.pieces).encode()

    def trial(self, rng: random.Random) -> str:
        kind = rng.choice(("safetensors", "safetensors", "safetensors", "pt", "bert"))
        if kind == "bert":
            path = self._place / "bert"
            files = {
                "config.json": as_json(edit(self._config, rng) if rng.random() < 0.7 else self._config, rng),
                "vocab.txt": self._words if rng.random() < 0.7 else any_bytes(self._words, rng),
                "model.safetensors": self._files["weights.safetensors"],
            }
            write(files, path)
        else:
            path = self._place / f"weights.{kind}"
            spoil = spoil_tensors if kind == "safetensors" else any_bytes
            write({path.name: spoil(self._files[path.name], rng)}, self._place)
        module = build_initial_module(self._recipe, self._data)
        initialize_from(module, path, self._data.reference.vocabulary)
        for name, value in module.state_dict().items():
            assert value.dtype == torch.float32, name
            assert value.isfinite().all(), f"{name} is not finite"
        return f"{kind}: loaded"


class Conversions:
    """A conversion of region files that was killed after two shards."""

    def __init__(self, folder: Path) -> None:
        self._place = folder / "spoilt" / "out"
        self._source = folder / "source"
        write_region_files(self._source / "images", {f"i{number}": fields(number) for number in range(7)})
        (self._source / "images" / "i3.npz").write_bytes(b"torn")
        rows = [row(f"i{number}", f"t{number}-{slot}") for slot in range(2) for number in range(7)]
        write_texts(self._source / "texts.jsonl", [row("gone", "lost"), *rows])
        write_texts(self._source / "others.jsonl", [dict(each, text="word3") for each in rows[::-1]])
        self._account = self._convert(folder / "whole")
        self._whole = read(folder / "whole")
        self._left = self._killed(folder / "killed")
        self._other = self._killed(folder / "other", "others.jsonl")

    def _convert(self, out: Path, texts: str = "texts.jsonl") -> str:
        settings = dataclasses.replace(LENIENT, shard_bytes=9000)
        return str(from_npz(out, self._source / "images", TextsFile(self._source / texts), settings))

    def _killed(self, out: Path, texts: str = "texts.jsonl") -> Files:
        class Killed(ShardWriter):
            left = 5

            def append(self, group: Any) -> None:
                if Killed.left == 0:
                    raise KeyboardInterrupt
                Killed.left -= 1
                super().append(group)

        whole, join.ShardWriter = join.ShardWriter, Killed  # type: ignore[misc]
        try:
            self._convert(out, texts)
        except KeyboardInterrupt:
            pass
        finally:
            join.ShardWriter = whole  # type: ignore[misc]
        return read(out)

    def trial(self, rng: random.Random) -> str:
        files = dict(self._left)
        spoil_conversion(files, JOURNAL_NAME, self._other, rng)
        write(files, self._place)
        account = self._convert(self._place)
        assert account == self._account, "another account"
        assert read(self._place) == self._whole, "another set"
        return "went on"
