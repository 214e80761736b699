"""What a run says before it begins."""

import dataclasses
from pathlib import Path

import torch

from tests.runs import tiny_recipe
from tests.tiny import tiny_module
from villa_ds.config import AdversaryConfig, EngineConfig, ModalityConfig, PhaseConfig, Recipe
from villa_ds.mapping import from_mapping
from villa_ds.train.session import rounding_warnings


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
