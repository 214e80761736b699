"""Recipes: what is read, what is refused, and that a refusal names the key, the value and the mend."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from villa_ds.config import AdversaryConfig, ModalityConfig, OptimizerConfig, Recipe, TaskConfig, dump, load_recipe
from villa_ds.errors import ConfigError
from villa_ds.mapping import from_mapping, read_yaml, to_mapping

MINIMAL: dict[str, Any] = {
    "name": "small",
    "data": {"sets": {"demo": "shards/demo"}},
    "tasks": [{"data": "demo", "objective": "mlm"}, {"data": "demo", "objective": "itm", "weight": 0.5}],
    "phases": [{"name": "plain", "steps": 10}, {"name": "villa", "steps": 5, "adversary": {"steps": 2}}],
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_and_derived_values(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.tasks == (TaskConfig("demo", "mlm"), TaskConfig("demo", "itm", 0.5))
    assert recipe.phases[0].adversary is None
    assert recipe.phases[1].adversary == AdversaryConfig(steps=2)
    assert recipe.optimizer == OptimizerConfig()
    assert recipe.total_steps == 15
    assert recipe.run_directory == Path("runs/small")
    assert load_recipe(recipe_file, ["output=/else/where"]).run_directory == Path("/else/where")


def test_overrides_reach_lists_nothing_and_new_groups(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "phases.1.adversary.image.step_size=1e-2",  # YAML 1.1 takes this for text
            "phases.0.adversary.modality=image",  # there was no adversary
            "tasks.1.weight=3",
            "optimizer.betas=[0.8, 0.95]",
            "model.fused_layer_norm=false",
            "engine.device=cpu",
            "engine.device=",  # the last one counts, and nothing is None
            "data.sets.other=a=b",  # only the first = separates
        ],
    )
    assert recipe.phases[1].adversary == AdversaryConfig(steps=2, image=ModalityConfig(step_size=0.01))
    assert recipe.phases[0].adversary == AdversaryConfig(modality="image")
    assert recipe.tasks[1].weight == 3.0
    assert recipe.optimizer.betas == (0.8, 0.95)
    assert recipe.model.fused_layer_norm is False
    assert recipe.engine.device is None
    assert recipe.data.sets == {"demo": "shards/demo", "other": "a=b"}


def test_words_that_were_booleans_in_older_yaml_are_words(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("verify: off\nremote: on\nno: yes\nflag: true\nother: False\n")
    assert read_yaml(path, ["more=off", "less=false"]) == {
        "verify": "off", "remote": "on", "no": "yes", "flag": True, "other": False, "more": "off", "less": False,
    }  # fmt: skip


def test_an_override_reaches_one_place_where_yaml_shares(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    text = yaml.safe_dump({**MINIMAL, "phases": []}).replace(
        "phases: []",
        "phases: [{name: a, steps: 1, adversary: &one {steps: 2}}, {name: b, steps: 1, adversary: *one}]",
    )
    path.write_text(text)
    first, second = load_recipe(path, ["phases.0.adversary.steps=7"]).phases
    assert first.adversary is not None
    assert second.adversary is not None
    assert (first.adversary.steps, second.adversary.steps) == (7, 2)


def test_dump_reads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["optimizer.eps=1e-8", "initialize=weights.pt", "optimizer.learning_rate=3e-5"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(recipe))
    assert load_recipe(again) == recipe
    assert from_mapping(Recipe, to_mapping(recipe), "") == recipe
    assert to_mapping(recipe)["phases"][1]["adversary"]["steps"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys, at every depth, with what is known there
        ("modle.preset=base", "modle: unknown key; known here: name, output, seed"),
        ("optimizer.lr=1", "optimizer.lr: unknown key; known here: name, learning_rate, betas"),
        (
            "phases.1.adversary.text.size=1",
            "phases.1.adversary.text.size: unknown key; known here: step_size, max_norm",
        ),
        ("tasks.0.wieght=1", "tasks.0.wieght: unknown key; known here: data, objective, weight"),
        # types
        ("seed=1.5", "seed: expected int, got 1.5"),
        ("seed=true", "seed: expected int, got True"),
        ("seed=", "seed: expected int, got None"),
        ("name=7", "name: expected str, got 7"),
        ("log.tensorboard=1", "log.tensorboard: expected bool, got 1"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected float, got 'fast'"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate: expected float, got True"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected 2 values, got 1: [0.9]"),
        ("optimizer.betas=[0.9, x]", "optimizer.betas.1: expected float, got 'x'"),
        ("optimizer.betas=0.9", "optimizer.betas: expected a list, got 0.9"),
        ("tasks=mlm", "tasks: expected a list, got 'mlm'"),
        ("tasks.0=mlm", "tasks.0: expected keys and values, got 'mlm'"),
        ("data.sets=[a]", "data.sets: expected keys and values, got ['a']"),
        ("data.sets.demo=3", "data.sets.demo: expected str, got 3"),
        ("optimizer.schedule=cosine", "optimizer.schedule: 'cosine' is not one of linear, constant, noam, vqa_steps"),
        ("model=none", "model: expected keys and values, got 'none'"),
        # values, each by its own class, each with the key where it stands in the recipe
        ("data.lanes=0", "data.lanes: 0 does not do: give 1 or more"),
        ("data.workers=-1", "data.workers: -1 does not do: give 0 or more"),
        ("tasks.1.weight=0", "tasks.1.weight: 0.0 does not do: give a positive share, or leave the task out"),
        ("phases.1.steps=0", "phases.1.steps: 0 does not do: give 1 or more"),
        ("phases.1.adversary.steps=0", "phases.1.adversary.steps: 0 does not do: give 1 or more"),
        ("phases.1.adversary.text.max_norm=-1", "phases.1.adversary.text.max_norm: -1.0 does not do: give 0 or more"),
        ("phases.1.adversary.init=normal", "phases.1.adversary.text.init_norm: 0.0 does not do: init normal needs"),
        ('engine.ds_config=""', "engine.ds_config: '' does not do: give a file of ds_configs/ or a path, or null"),
        ('engine.device=""', "engine.device: '' does not do: give cpu or cuda, or null"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: 0.0 does not do: give a positive rate"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: nan does not do: give a finite number"),
        ("optimizer.learning_rate=1e300", "optimizer.learning_rate: 1e+300 does not do: give a finite number, at most"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate: nan does not do: give a finite number"),
        ("tasks.0.weight=.inf", "tasks.0.weight: inf does not do: give a finite number"),
        ("data.timeout_s=-.inf", "data.timeout_s: -inf does not do: give a finite number"),
        ("data.tokens=1000000000000000000000", "data.tokens: 1000000000000000000000 does not do: give a finite number"),
        ("seed=9223372036854775808", "seed: 9223372036854775808 does not do: give a finite number, at most 922"),
        ("tasks.1={data: demo, objective: mlm}", "tasks.1: 'mlm on demo' does not do: tasks.0 is the same"),
        ("name=..", "name: '..' does not do: it names the run directory"),
        ("name=''", "name: '' does not do: it names the run directory"),
        ("output=''", "output: '' does not do: give the folder of the run, or null"),
        ("initialize=''", "initialize: '' does not do: give weights, or null"),
        ("optimizer={schedule: noam}", "optimizer.warmup_steps: 0 does not do: schedule noam needs 1 or more"),
        (
            "phases.1.adversary={kl_weight: 0, task_weight: 0, clean_weight: 1}",
            "phases.1.adversary.kl_weight: 0.0 does not do: with task_weight 0 perturbed passes count for nothing",
        ),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm: -1.0 does not do: give 0 (no clipping) or more"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: [0.9, 1.0] does not do: give two numbers in [0, 1)"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps: -1 does not do: give 0 or more"),
        ("optimizer.decay_interval=0", "optimizer.decay_interval: 0 does not do: give 1 or more"),
        ("objectives.mlm.probability=15", "objectives.mlm.probability: 15.0 does not do: give a share from 0 to 1"),
        (
            "objectives.mlm.random_share=0.3",
            "objectives.mlm.random_share: 0.3 does not do: with mask_share it makes 1.1",
        ),
        ("objectives.mrm.probability=-1", "objectives.mrm.probability: -1.0 does not do: give a share from 0 to 1"),
        ("objectives.itm.negative_probability=2", "objectives.itm.negative_probability: 2.0 does not do: give a share"),
        ("objectives.itm.ot_beta=0.01", "objectives.itm.ot_beta: 0.01 does not do: give 0.025 or more"),
        ("objectives.vqa.num_answers=0", "objectives.vqa.num_answers: 0 does not do: give 1 or more"),
        ("phases.1.adversary.clean_weight=-1", "phases.1.adversary.clean_weight: -1.0 does not do: give 0 or more"),
        ("engine.threads=-1", "engine.threads: -1 does not do: give 0 (torch's choice) to 1024"),
        ("watch.timeout_s=1e30", "watch.timeout_s: 1e+30 does not do: give seconds, at most 10,000,000, or 0"),
        ("engine.threads=1000000", "engine.threads: 1000000 does not do: give 0 (torch's choice) to 1024"),
        ("objectives.refexp.layers=true", "objectives.refexp.layers: True is not one of 1, 2"),
        ("objectives.refexp.layers=2.0", "objectives.refexp.layers: 2.0 is not one of 1, 2"),
        ("validation.every=-1", "validation.every: -1 does not do: give 0 or more"),
        ("log.every=0", "log.every: 0 does not do: give 1 or more"),
        ("checkpoints.keep_last=0", "checkpoints.keep_last: 0 does not do: give 1 or more"),
        ("tasks=[]", "tasks: [] does not do: name at least one data set and objective"),
        ("phases=[]", "phases: [] does not do: name at least one phase"),
        ("tasks.1.data=coco", "tasks.1.data: 'coco' does not do: data.sets has ['demo']"),
        ("data.validation.coco=x", "data.validation.coco: 'coco' does not do: it needs a training set of that name"),
        # missing keys
        ("tasks.0={data: demo}", "tasks.0.objective: missing, give it a value"),
        # overrides that cannot be applied
        ("optimizer.eps", "'optimizer.eps': an override has the form dotted.key=value"),
        ("=3", "'=3': an override has the form dotted.key=value"),
        ("seed.x=3", "seed: expected int, got {'x': 3}"),
        ("name.x=3", "name.x: name is 'small', not a group of keys"),
        ("tasks.2.weight=1", "tasks.2.weight: '2' is not one of the 2 list elements, counted from 0"),
        ("tasks.-1=x", "tasks.-1: '-1' is not one of the 2 list elements, counted from 0"),
        ("tasks.first.weight=1", "tasks.first.weight: 'first' is not one of the 2 list elements"),
        ("optimizer.betas=[0.9", "optimizer.betas: '[0.9' is not YAML"),
    ],
)
def test_refusals(recipe_file: Path, override: str, message: str) -> None:
    assert refusal(recipe_file, override).startswith(message)


def test_alternate_needs_the_released_objective(recipe_file: Path) -> None:
    message = refusal(recipe_file, "phases.1.adversary.modality=alternate", "phases.1.adversary.objective=paper")
    assert message.startswith("phases.1.adversary.modality: 'alternate' does not do: objective paper already perturbs")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected a mapping of keys to values"),
        (b"", "expected a mapping of keys to values"),
        (b"a: [1, 2\n", "not YAML: "),
        (b"name: caf\xe9\n", "not UTF-8 text, byte 9 is 0xe9"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {message}")
    assert "\n" not in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read: No such file or directory"
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be read: ")


def test_a_key_given_twice_is_refused(recipe_file: Path) -> None:
    text = recipe_file.read_text()
    recipe_file.write_text(text + "optimizer: {eps: 1.0e-8, eps: 1.0e-6}\n")
    assert refusal(recipe_file) == "optimizer.eps: given 2 times, keep one"
    recipe_file.write_text(text.replace("- data: demo", "- data: demo\n  data: demo", 1))
    assert refusal(recipe_file) == "tasks.0.data: given 2 times, keep one"


def test_configurations_built_in_python_check_themselves_too() -> None:
    with pytest.raises(ConfigError, match=r"^steps: 0 does not do: give 1 or more$"):
        AdversaryConfig(steps=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdversaryConfig().steps = 3  # type: ignore[misc]


def test_perturbs() -> None:
    perturbed = {
        modality: [name for name in ("text", "image") if AdversaryConfig(modality=modality).perturbs(name)]
        for modality in ("text", "image", "both", "alternate")
    }
    assert perturbed == {
        "text": ["text"],
        "image": ["image"],
        "both": ["text", "image"],
        "alternate": ["text", "image"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2001-99-99", "not YAML: month must be in"),
        ("a: &a [*a]", "its anchors stand for more than 100000 values"),
        (
            "\n".join(["b0: &b0 [x]", *(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 9))]),
            "anchors",
        ),
        ("a: " + "[" * 5000, "not YAML: "),
    ],
)
def test_yaml_that_is_made_to_hurt_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)
