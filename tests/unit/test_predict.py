"""`villa-ds predict`: pictures and texts give, through a stored extractor, what evaluation of their shards gives."""

import copy
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import pytest
import torch

from tests.runs import MODEL, tiny_recipe, write_recipe
from tests.tiny import MANIFEST, tiny_batch, tiny_module, tiny_sample
from tests.unit.test_from_images import picture
from villa_ds.batch import LossOutput
from villa_ds.cli import main
from villa_ds.config import Recipe, load_recipe
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.collate import collate
from villa_ds.data.convert.easy_vqa import demo
from villa_ds.data.convert.extractors import load_extractor
from villa_ds.data.convert.images import from_images
from villa_ds.data.convert.regions import FILE_NAME
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest
from villa_ds.errors import CheckpointError, ConfigError
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import build_objective
from villa_ds.objectives.refexp import PADDING_SCORE
from villa_ds.predict import Predictor
from villa_ds.rng import Stream
from villa_ds.train.checkpoint import RUN_STATE, resolve_checkpoint
from villa_ds.train.loop import train

PICTURES = 5  # of the demo's test set


class World:
    """Demo shards, pictures and questions of their test set, and two short runs on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.shards = root, root / "shards"
        demo(self.shards, images=20, processes=1)
        self.extractor = self.shards / FILE_NAME
        tasks = [{"data": "demo", "objective": objective} for objective in ("vqa", "itm", "mlm")]
        self.recipe = tiny_recipe(
            self.shards,
            root / "unused",
            model=MODEL | {"max_position_embeddings": 32},
            data={
                "root": str(self.shards), "sets": {"demo": "vqa/train"}, "validation": {"demo": "vqa/test"},
                "tokens": 512, "rows_multiple": 2, "lanes": 1, "window": 256, "workers": 0,
            },
            tasks=tasks,
            phases=[{"name": "short", "steps": 2}],
            optimizer={"learning_rate": 0.02},
        )  # fmt: skip
        self.runs = [self.train(seed) for seed in (1, 2)]
        self.images = root / "pictures"
        folder = self.images / "easy_vqa" / "test"
        folder.mkdir(parents=True)
        for number in range(PICTURES):
            shutil.copy(easy_vqa.get_test_image_paths()[number], folder / f"{number}.png")
        texts, _, numbers = easy_vqa.get_test_questions()
        self.questions = [
            {"id": f"test-q{place:05d}", "image": f"easy_vqa/test/{number}.png", "text": text}
            for place, (text, number) in enumerate(zip(texts, numbers, strict=True))
            if number < PICTURES
        ]
        self.texts = write_lines(root / "texts.jsonl", reversed(self.questions))

    def train(self, seed: int, **changes: Any) -> Path:
        run = self.root / f"run{seed}"
        train(from_mapping(Recipe, self.recipe | {"output": str(run), "seed": seed} | changes, ""))
        return run

    def evaluated(self, *runs: Path) -> dict[str, dict[str, Any]]:
        """What `villa-ds evaluate` writes for the test set's questions."""
        path = write_recipe(self.root / "recipe.yaml", self.recipe | {"output": str(self.root / "together")})
        assert main(["evaluate", str(path), *(f"checkpoint={run}" for run in runs)]) == 0
        folder = self.root / "together" if len(runs) > 1 else runs[0]
        (predictions,) = (folder / "evaluation").glob("*/predictions-demo-vqa.jsonl")
        return {row["id"]: row for row in map(json.loads, predictions.read_text().splitlines())}

    def ask(self, *more: str, runs: Sequence[Path] | None = None) -> list[str]:
        chosen = self.runs[:1] if runs is None else runs
        return ["predict", *map(str, chosen), "--extractor", str(self.extractor), *more]


def write_lines(path: Path, rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("members", [1, 2])
def test_pictures_and_questions_give_what_evaluation_of_their_shards_gives(
    world: World, capsys: pytest.CaptureFixture[str], members: int
) -> None:
    """In the order of the file of texts; the same answers as from the shards that the demo made of these pictures."""
    runs = world.runs[:members]
    expected = world.evaluated(*runs)
    capsys.readouterr()
    more = ["--images", str(world.images), "--texts", str(world.texts), "--objective", "vqa", "--top", "3"]
    assert main(world.ask(*more, runs=runs)) == 0
    rows = rows_of(capsys)
    assert [{key: row[key] for key in ("id", "image", "text")} for row in rows] == world.questions[::-1]
    for row in rows:
        assert (row["answer"], row["label"]) == (expected[row["id"]]["answer"], expected[row["id"]]["label"])
        assert row["answer"] in easy_vqa.get_answers()
        assert row["top"][0]["answer"] == row["answer"]
        chances = [each["probability"] for each in row["top"]]
        assert len(chances) == 3
        assert 1 > chances[0] >= chances[1] >= chances[2] > 0
        assert chances[0] == row["probability"]
        assert "score" not in row  # of a truth that nobody told


def test_one_picture_and_some_questions(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.images / "easy_vqa/test/3.png"
    texts = ["is there a red circle?", "what color is the shape?"]
    command = world.ask("--image", str(path), "--objective", "vqa", *(f"--text={text}" for text in texts))
    assert main(command) == 0
    rows = rows_of(capsys)
    assert [(row["image"], row["text"]) for row in rows] == [("3.png", text) for text in texts]
    predictor = Predictor(world.runs[:1], load_extractor(str(world.extractor)), "vqa")
    lines = [{"id": str(place), "image": "easy_vqa/test/3", "text": text} for place, text in enumerate(texts)]
    again = predictor.ask(world.images, write_lines(world.root / "two.jsonl", lines))
    for row, other in zip(rows, again, strict=True):
        assert row["probability"] == pytest.approx(other["probability"], rel=1e-5)
    assert main([*command, "--out", str(world.root / "new" / "out.jsonl")]) == 0
    assert [json.loads(line) for line in (world.root / "new" / "out.jsonl").read_text().splitlines()] == rows


def test_matching_takes_pairs_as_they_are(world: World) -> None:
    """No image is replaced, however often training replaces one."""
    predictor = Predictor(world.runs[:1], load_extractor(str(world.extractor)), "itm")
    rows = list(predictor.ask(world.images, world.texts))
    assert len(rows) == len(world.questions)
    assert all(row.keys() == {"id", "image", "text", "matched_probability"} for row in rows)
    once = {row["id"]: row["matched_probability"] for row in rows}
    few = write_lines(world.root / "few.jsonl", world.questions[:3])
    for row in predictor.ask(world.images, few):
        assert row["matched_probability"] == pytest.approx(once[row["id"]], rel=1e-5)


def test_what_has_no_answer_says_why(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    images = world.root / "mixed"
    picture(images / "good.png")
    (images / "torn.png").write_bytes((images / "good.png").read_bytes()[:50])
    lines = [
        {"id": "a", "image": "torn", "text": "is it red?"},
        {"id": "b", "image": "good", "text": "is it red?"},
        "no JSON",
        {"id": "b", "image": "good", "text": "is it blue?"},
        {"id": "c", "image": "absent", "text": "is it red?"},
    ]
    texts = write_lines(world.root / "mixed.jsonl", lines)
    assert main(world.ask("--images", str(images), "--texts", str(texts), "--objective", "vqa")) == 2
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["id"], "answer" in row) for row in rows] == [
        *(("a", False), ("b", True), ("c", False)),
        *(("line 3", False), ("b", False)),
    ]
    assert "cannot be read as a picture" in rows[0]["error"]
    assert "no image 'absent'" in rows[2]["error"]
    assert "occurs before" in rows[4]["error"]
    assert printed.err.splitlines()[-1] == 'villa-ds: 4 of 5 texts have no answer: see "error" in their lines'


def test_a_picture_that_is_none_is_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.root / "none.png"
    path.write_text("no picture")
    assert main(world.ask("--image", str(path), "--text", "is it red?", "--objective", "vqa")) == 2
    told = capsys.readouterr().err
    assert "nothing can be written: none.png: cannot be read as a picture" in told
    assert told.count("\n") == 1


def test_a_checkpoint_tells_what_it_was_trained_on(world: World) -> None:
    state = json.loads((resolve_checkpoint(world.runs[0]) / RUN_STATE).read_text())
    manifest = load_manifest(world.shards / "vqa/train")
    assert state["inputs"]["sets"] == {
        "demo": {"extractor": manifest.extractor, "answers": list(manifest.answers)},
    }
    assert state["inputs"]["pieces"] == list(manifest.read_pieces())


def test_another_extractor_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    command = world.ask("--images", str(world.images), "--texts", str(world.texts), "--objective", "vqa")
    command[command.index("--extractor") + 1] = "pixels"
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "trained on regions of 'pixel regions 1, 64 classes, sha256" in told
    assert "but this extractor is 'pixel regions 1, 2 classes" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "x", "--texts", "y"], "was trained for itm, mlm, vqa: choose with --objective"),
        (["--images", "x", "--texts", "y", "--objective", "ve"], "--objective 've': "),
        (["--images", "x", "--texts", "y", "--objective", "mlm"], "predicts nothing of a pair"),
        (["--images", "x", "--texts", "y", "--objective", "vqa"], "y: cannot read the texts"),
        (["--images", "x", "--text", "y"], "--image goes with --text, --images with --texts"),
        (["--image", "x.png", "--text", "y", "--objective", "vqa"], "x.png: no such picture"),
    ],
)
def test_an_impossible_question_is_one_line(
    world: World, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(world.ask(*more)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_members_must_have_learnt_from_the_same(world: World, tmp_path: Path) -> None:
    extractor = load_extractor(str(world.extractor))
    shutil.copytree(world.shards, tmp_path / "shards")
    recipe = world.recipe | {"data": world.recipe["data"] | {"sets": {"demo": "pretrain/train"}, "validation": {}}}
    recipe |= {"output": str(tmp_path / "other"), "tasks": [{"data": "demo", "objective": "itm"}]}
    train(load_recipe(write_recipe(tmp_path / "r.yaml", recipe)))
    with pytest.raises(CheckpointError, match="other: trained on other vocabulary, answers or regions than"):
        Predictor([world.runs[0], tmp_path / "other"], extractor, "itm")


def test_a_checkpoint_of_an_earlier_version(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older = tmp_path / "older"
    shutil.copytree(world.runs[0], older)
    forget_inputs(resolve_checkpoint(older))
    asked = world.ask("--images", str(world.images), "--texts", str(world.texts), "--objective", "vqa", runs=[older])
    capsys.readouterr()
    assert main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"villa-ds: {older}: saved by an earlier version, it does not tell its vocabulary and extractor: let the run "
        "take another step with this version (raise a phase's steps, --allow-change phases), or use `villa-ds evaluate`"
    )
    longer = world.recipe | {"output": str(older), "seed": 1, "phases": [{"name": "short", "steps": 3}]}
    train(from_mapping(Recipe, longer, ""), allow_change=["phases"])
    capsys.readouterr()
    assert main(asked) == 0
    assert len(rows_of(capsys)) == len(world.questions)


def forget_inputs(folder: Path) -> None:
    """Make a checkpoint what it was before it told its inputs; its manifest says so too."""
    path = folder / RUN_STATE
    state = json.loads(path.read_text())
    del state["inputs"]
    path.write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][RUN_STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_answers_come_with_probabilities_and_no_more_of_them_than_there_are() -> None:
    module = tiny_module("vqa")
    objective = module.objectives["vqa"]
    batch = tiny_batch(objective, rows=3)
    output = module.eval()(batch, "vqa")
    forecast = objective.forecast(output, batch, top=50)
    assert [len(row["top"]) for row in forecast] == [5, 5, 5]
    assert [row["label"] for row in forecast] == output.logits.argmax(-1).tolist()
    expected = output.logits.sigmoid().max(-1).values.detach()
    np.testing.assert_allclose([row["probability"] for row in forecast], expected, rtol=1e-6)


def test_referring_expressions_tell_the_boxes_of_the_best_regions() -> None:
    """Without knowing the region meant; padding is never among them, and nothing is said of the truth."""
    objective = build_objective("refexp", ObjectivesConfig(), MANIFEST).held_out()
    samples = [dataclasses.replace(tiny_sample(number), target={}) for number in range(3)]
    batch = collate([objective.prepare(sample, Stream("x")) for sample in samples], objective.reads)
    scores = torch.full((3, 4), PADDING_SCORE)
    scores[0, :2], scores[1, :3], scores[2, :4] = (torch.tensor(row) for row in ([1, 2], [3, 1, 2], [0, 1, 2, -1]))
    output = LossOutput(scores.sum(), scores, scores, {})
    forecast = objective.forecast(output, batch, top=3)
    assert [[each["region"] for each in row["top"]] for row in forecast] == [[1, 0], [0, 2, 1], [2, 1, 0]]
    assert [row["region"] for row in forecast] == [1, 0, 2]
    for row, sample in zip(forecast, samples, strict=True):
        assert row.keys() == {"region", "box", "score", "top"}
        assert row["box"] == pytest.approx(sample.regions.boxes[row["region"], :4].tolist())


def test_two_pictures_and_a_statement(world: World, tmp_path: Path) -> None:
    names = [f"easy_vqa/test/{number}.png" for number in range(PICTURES)]
    lines = [
        {"id": str(place), "image": [one, other], "text": "both are red", "target": {"label": place % 2}}
        for place, (one, other) in enumerate(itertools.permutations(names, 2))
    ]
    from_images(
        tmp_path / "shards/pairs", world.images, TextsFile(write_lines(tmp_path / "t.jsonl", lines)),
        load_extractor(str(world.extractor)), Settings(load_manifest(world.shards / "vqa/train").read_pieces(), "test"),
    )  # fmt: skip
    recipe = copy.deepcopy(world.recipe)
    recipe |= {"output": str(tmp_path / "run"), "tasks": [{"data": "demo", "objective": "nlvr2"}]}
    recipe["data"] |= {"root": str(tmp_path / "shards"), "sets": {"demo": "pairs"}, "validation": {}}
    recipe["model"] |= {"type_vocab_size": 3}
    train(from_mapping(Recipe, recipe, ""))
    predictor = Predictor([tmp_path / "run"], load_extractor(str(world.extractor)))
    unlabelled = [{key: value for key, value in line.items() if key != "target"} for line in lines[:3]]
    rows = list(predictor.ask(world.images, write_lines(tmp_path / "u.jsonl", unlabelled)))
    assert [row["image"] for row in rows] == [line["image"] for line in lines[:3]]
    for row in rows:
        assert row.keys() == {"id", "image", "text", "answer", "true_probability"}
        assert row["answer"] == (row["true_probability"] > 0.5)


def test_ranking_is_left_to_evaluation(world: World, tmp_path: Path) -> None:
    recipe = world.recipe | {"output": str(tmp_path / "run"), "tasks": [{"data": "demo", "objective": "retrieval"}]}
    train(from_mapping(Recipe, recipe, ""))
    with pytest.raises(ConfigError, match="ranks pairs among others of a set"):
        Predictor([tmp_path / "run"], load_extractor(str(world.extractor)))
