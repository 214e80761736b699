"""VCR's second stage of pre-training, and fine-tuning of every task from one pre-trained run."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.downstream import make_task_shards
from tests.runs import final_state, tiny_recipe
from tests.tiny import MANIFEST, VOCABULARY, tiny_sample
from villa_ds.batch import Sample
from villa_ds.config import Recipe
from villa_ds.config_objectives import MaskingConfig, ObjectivesConfig, VcrConfig
from villa_ds.errors import ConfigError, DataError
from villa_ds.mapping import from_mapping
from villa_ds.models.weights import to_reference
from villa_ds.objectives.base import build_objective
from villa_ds.rng import Stream
from villa_ds.train.loop import train
from villa_ds.train.session import build_initial_module, open_data

LAYOUTS = ("vqa", "gqa", "ve", "vcr", "nlvr2", "refexp", "retrieval")
STORY = ObjectivesConfig(text="vcr", vcr=VcrConfig(new_words=0))
TYPES = "uniter.embeddings.token_type_embeddings.weight"
WORDS = "uniter.embeddings.word_embeddings.weight"


def story(**changes: object) -> Sample:
    sample = tiny_sample(1)
    target: dict[str, object] = {
        "answers": [[20], [21, 22], [23], [24]], "rationales": [[30], [31], [32, 33], [34]],
        "answer": 1, "rationale": 2,
    }  # fmt: skip
    return Sample(sample.id, sample.word_pieces, sample.regions, target | changes)


@pytest.mark.parametrize("name", ["mlm", "mrfr", "mrckl"])
def test_layout(name: str) -> None:
    settings = ObjectivesConfig(text="vcr", mlm=MaskingConfig(mask_share=0, random_share=0))
    example = build_objective(name, settings, MANIFEST).prepare(story(), Stream("prepare"))
    question = tiny_sample(1).word_pieces.tolist()
    seen = example.input_ids.tolist()
    if name == "mlm":  # at least one piece of each segment is selected, and masked if it was forced
        assert example.read_text is not None
        seen = np.where(example.input_ids == VOCABULARY.mask, 0, example.input_ids).tolist()
        for place, piece in zip(example.read_text.tolist(), example.targets["word_pieces"].tolist(), strict=True):
            seen[place] = piece
        ends = np.cumsum([1, len(question) + 1, 3, 3])
        assert all(((example.read_text >= low) & (example.read_text < high - 1)).any()
                   for low, high in pairwise(ends.tolist()))  # fmt: skip
    assert seen == [2, *question, 3, 21, 22, 3, 32, 33, 3]
    assert example.token_types.tolist() == [0] * (len(question) + 2) + [2, 2, 2, 3, 3, 3]


def test_a_story_needs_right_answers() -> None:
    with pytest.raises(DataError, match=r"no right rationale among 4; objectives\.text=vcr needs it"):
        build_objective("mlm", STORY, MANIFEST).prepare(story(rationale=None), Stream("prepare"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for layout in (*LAYOUTS, "caption"):
        make_task_shards(folder / layout, layout, groups=6)
    values = recipe_of(folder, "caption", "mlm", "itm", "mrfr", steps=1)
    values["model"]["type_vocab_size"] = 2
    train(from_mapping(Recipe, values, ""))
    return folder


def recipe_of(root: Path, layout: str, *objectives: str, steps: int = 1, **changes: Any) -> dict[str, Any]:
    values = tiny_recipe(root, root / f"run-{layout}", **changes)
    values["model"] = {**values["model"], "max_position_embeddings": 60}
    del values["model"]["type_vocab_size"]
    values["data"] |= {"sets": {"demo": layout}, "validation": {}, "tokens": 2000, "rows_multiple": 1}
    values["data"]["max_text_length"] = 100
    values["tasks"] = [{"data": "demo", "objective": name} for name in objectives]
    values["phases"] = [{"name": "standard", "steps": steps}]
    values["model"]["preset"] = "uniter-demo"
    values["optimizer"] = {"learning_rate": 0.01}
    return values


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_task_starts_from_a_pretrained_run(root: Path, layout: str) -> None:
    """Token types grow as the task says; what it shares with pre-training is the pre-trained."""
    values = recipe_of(root, layout, layout, initialize=str(root / "run-caption"), objectives={"vcr": {"new_words": 0}})
    recipe = from_mapping(Recipe, values, "")
    module = build_initial_module(recipe, open_data(recipe))
    found = to_reference(module.state_dict())
    stored = {
        name.removeprefix("weight/"): value for name, value in final_state(root / "run-caption").items()
        if name.startswith("weight/")
    }  # fmt: skip
    pretrained = to_reference(stored)
    grown = {"vcr": [0, 1, 0, 0], "nlvr2": [0, 1, 1]}.get(layout, [0, 1])
    assert torch.equal(found[TYPES], pretrained[TYPES][grown])
    shared = [name for name in found if name.startswith("uniter.") and name != TYPES]
    assert shared
    assert all(torch.equal(found[name], pretrained[name]) for name in shared)
    if layout == "retrieval":
        assert torch.equal(found["rank_output.weight"], pretrained["itm_output.weight"][1:])


def test_the_second_stage_keeps_the_masked_language_head(root: Path) -> None:
    """Growing words grow the head's bias; its transform and the old words' biases are the pre-trained ones."""
    values = recipe_of(
        root, "vcr", "mlm", "mrfr", "mrckl", initialize=str(root / "run-caption"),
        objectives={"text": "vcr", "vcr": {"new_words": 0}},
    )  # fmt: skip
    recipe = from_mapping(Recipe, values, "")
    module = build_initial_module(recipe, open_data(recipe))
    assert module.backbone.sizes.type_vocab_size == 4
    head = module.get_submodule("cls")
    with torch.no_grad():
        head.get_parameter("predictions.bias").normal_()
    whole = to_reference(module.state_dict())
    fewer = {name: value[:-5] if name in {WORDS, "cls.predictions.bias", "cls.predictions.decoder.weight"} else value
             for name, value in whole.items()}  # fmt: skip
    from villa_ds.models.weights import load_reference

    settings = ObjectivesConfig(text="vcr", vcr=VcrConfig(new_words=5))
    fresh = build_initial_module(from_mapping(Recipe, values | {"initialize": None, "seed": 3}, ""), open_data(recipe))
    before = to_reference(fresh.state_dict())
    report = load_reference(fresh, fewer, [build_objective("mlm", settings, MANIFEST).adaptation])
    after = to_reference(fresh.state_dict())
    assert report.missing == ()
    for name, value in whole.items():
        if name in fewer and len(fewer[name]) < len(value):
            assert torch.equal(after[name][:-5], value[:-5])
            assert torch.equal(after[name][-5:], before[name][-5:])
        else:
            assert torch.equal(after[name], value), name


def test_the_second_stage_trains_and_is_fine_tuned(root: Path) -> None:
    objectives = {"text": "vcr", "vcr": {"new_words": 0}}
    values = recipe_of(
        root, "vcr", "mlm", "mrckl", steps=2, initialize=str(root / "run-caption"), objectives=objectives
    )
    train(from_mapping(Recipe, values | {"output": str(root / "second")}, ""))
    tuned = recipe_of(root, "vcr", "vcr", initialize=str(root / "second"), objectives=objectives)
    recipe = from_mapping(Recipe, tuned, "")
    found = to_reference(build_initial_module(recipe, open_data(recipe)).state_dict())
    stored = final_state(root / "second")
    assert torch.equal(found[TYPES], stored[f"weight/{TYPES}"])
    assert not torch.equal(found[TYPES][2], found[TYPES][0])


def test_vcr_and_nlvr2_do_not_mix(root: Path) -> None:
    values = recipe_of(root, "vcr", "vcr")
    values["data"]["sets"] = {"a": "vcr", "b": "nlvr2"}
    values["tasks"] = [{"data": "a", "objective": "vcr"}, {"data": "b", "objective": "nlvr2"}]
    recipe = from_mapping(Recipe, values, "")
    with pytest.raises(
        ConfigError, match="'vcr' and 'nlvr2' use the rows of the token type table for different things"
    ):
        build_initial_module(recipe, open_data(recipe))
