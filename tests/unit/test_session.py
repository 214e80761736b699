"""What a run says before it begins."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.runs import make_data, tiny_recipe
from tests.tiny import tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, OptimizerConfig, PhaseConfig, Recipe
from villa_ds.data.manifest import MANIFEST_NAME, fingerprint_of
from villa_ds.errors import ConfigError, DataError
from villa_ds.mapping import from_mapping
from villa_ds.train.checkpoint import resolve_checkpoint
from villa_ds.train.loop import train
from villa_ds.train.parameters import ParameterFiles
from villa_ds.train.session import build_initial_module, open_data, refuse_unequal_ranks, rounding_warnings
from villa_ds.train.torch_engine import TorchEngine


def test_a_step_below_the_formats_resolution_is_warned_of() -> None:
    recipe = from_mapping(Recipe, tiny_recipe(Path("data"), Path("run")), "")
    module = tiny_module("mlm", dtype=torch.float32)  # words spread by 0.2, 16 wide

    def warnings(precision: str, step: float, modality: str = "text") -> list[str]:
        adversary = AdversaryConfig(modality=modality, text=ModalityConfig(step), image=ModalityConfig(step))
        phases = (PhaseConfig("plain", 5), PhaseConfig("strong", 5, adversary))
        changed = dataclasses.replace(recipe, phases=phases, engine=EngineConfig(precision=precision))
        return rounding_warnings(changed, module)

    # 1e-2 / sqrt(16 x 16) / 0.2 = 3e-3: below bfloat16's 8e-3, above float16's 1e-3
    assert len(warnings("bfloat16", 1e-2)) == 1
    assert "phase strong: a text step of 0.01" in warnings("bfloat16", 1e-2)[0]
    assert warnings("float16", 1e-2) == warnings("float32", 1e-2) == warnings("bfloat16", 1e-1) == []
    assert warnings("bfloat16", 1e-2, "image") == []
    assert len(warnings("float16", 1e-3)) == 1


def test_sets_of_different_extractors_are_mixed_only_when_that_is_said(tmp_path: Path) -> None:
    path = make_data(tmp_path) / "held-out" / MANIFEST_NAME
    content = json.loads(path.read_text()) | {"extractor": "another one"}
    path.write_text(json.dumps(content | {"fingerprint": fingerprint_of(content)}))
    recipe = from_mapping(Recipe, tiny_recipe(tmp_path, tmp_path / "run"), "")
    with pytest.raises(
        DataError, match=r"held-out: extractor 'another one' differs from 'random numbers'.*mix_extract"
    ):
        open_data(recipe)
    mixed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mix_extractors=True))
    assert open_data(mixed).validation["demo"].extractor == "another one"


def test_ranks_that_opened_different_sets_are_refused(tmp_path: Path) -> None:
    data = open_data(from_mapping(Recipe, tiny_recipe(make_data(tmp_path), tmp_path / "run"), ""))
    other = {"demo": data.sets["demo"].fingerprint, "validation demo": "0" * 64}

    class TwoRanks(TorchEngine):
        def gather(self, value: object) -> list[object]:
            return [value, other]

    engine = TwoRanks(tiny_module("mlm"), EngineConfig(device="cpu"), OptimizerConfig())
    with pytest.raises(DataError, match=r"held-out: rank 1 opened another set validation demo than rank 0 .*0{64}"):
        refuse_unequal_ranks(data, engine)
    other["validation demo"] = data.validation["demo"].fingerprint
    refuse_unequal_ranks(data, engine)


def test_weights_of_a_run_on_other_regions_are_taken_only_when_that_is_said(tmp_path: Path) -> None:
    make_data(tmp_path)
    changes = {"phases": [{"name": "short", "steps": 1}], "optimizer": {}}
    train(from_mapping(Recipe, tiny_recipe(tmp_path, tmp_path / "first", **changes), ""))
    for name in ("train", "held-out"):
        path = tmp_path / name / MANIFEST_NAME
        content = json.loads(path.read_text()) | {"extractor": "another one"}
        path.write_text(json.dumps(content | {"fingerprint": fingerprint_of(content)}))
    recipe = from_mapping(Recipe, tiny_recipe(tmp_path, tmp_path / "run", initialize=str(tmp_path / "first")), "")
    with pytest.raises(
        ConfigError, match=r"initialize: .*trained on regions of random numbers, the sets here are of ano"
    ):
        build_initial_module(recipe, open_data(recipe))
    mixed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, mix_extractors=True))
    module = build_initial_module(mixed, open_data(mixed))
    trained = ParameterFiles(resolve_checkpoint(tmp_path / "first")).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())
