"""`villa-ds report`: one HTML file that is sound, complete, and needs nothing from outside."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runs import make_data, tiny_recipe
from villa_ds.analysis.attention import RowAttention
from villa_ds.analysis.maps import Shown, attention_map, by_head, definition, drawn_table
from villa_ds.cli import main
from villa_ds.config import Recipe
from villa_ds.data.manifest import load_manifest
from villa_ds.mapping import from_mapping
from villa_ds.train.checkpoint import resolve_checkpoint
from villa_ds.train.loop import train

SCORES = ("loss", "accuracy", "majority_baseline")
SECTIONS = ["compared", "results", "curves", "attention", "probing", "rephrasing", "made"]
VOID = {"meta", "img", "br", "link", "input"}
MODEL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40, "type_vocab_size": 2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2,
}  # fmt: skip
PLAIN = [{"name": "standard", "steps": 4}]
VILLA = [{"name": "standard", "steps": 2}, {"name": "adversarial", "steps": 2, "adversary": {"steps": 2}}]


class Sound(HTMLParser):
    """Every element is closed in order; gathers ids, references, text by section."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.section = ""
        self.texts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "section":
            self.section = values["id"]
        self.references += [values[name] for name in ("href", "src", "srcset", "data", "action") if name in values]
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(str(value) for value in values.values()))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = f"{self.texts.get(self.section, '')} {data}"


class Tables(HTMLParser):
    """The cells of all tables by section, and the titles of maps."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, list[list[list[str]]]] = {}
        self.titles: list[str] = []
        self._section, self._open = "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "section":
            self._section = dict(attrs)["id"]
            self.found[self._section] = []
        elif tag == "table":
            self.found[self._section].append([])
        elif tag == "tr":
            self.found[self._section][-1].append([])
        elif tag in ("td", "th"):
            self.found[self._section][-1][-1].append("")
            self._open = "cell"
        elif tag == "title" and self._section:
            self._open = "title"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._open = ""
        elif tag == "title" and self._section:
            self._open = "cell"

    def handle_data(self, data: str) -> None:
        if self._open == "title":
            self.titles.append(data)
        elif self._open == "cell":
            self.found[self._section][-1][-1][-1] += data.strip()

    def rows(self, section: str, place: int) -> list[list[str]]:
        """Of one table, without its header."""
        rows: list[list[str]] = []
        for row in self.found[section][place][1:]:
            rows.append([cell or (rows[-1][at] if rows and at < 2 else "") for at, cell in enumerate(row)])
        return rows


def as_shown(found: dict[str, Any], sign: str = "") -> str:
    """An estimate of the JSON as the page writes it."""
    width = "" if found["half_width"] is None else f" ± {found['half_width']:.3f}"
    return f"{round(found['mean'], 3) + 0.0:{sign}.3f}{width}"


def assert_numbers_agree(page: Path) -> dict[str, Any]:
    """Everything that the page tells in numbers is in the JSON beside it, and the same."""
    numbers: dict[str, Any] = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    tables = Tables(page)
    runs = numbers["runs"]
    assert [(row[0], row[4], row[5]) for row in tables.rows("compared", 0)] == [
        (label, f"{run['step']:,}", f"{run['parameters'] / 1e6:.2f}") for label, run in runs.items()
    ]
    assert tables.rows("results", 0) == [
        [row["run"], row["task"], *("" if row[name] is None else f"{row[name]:.4f}" for name in SCORES)]
        for row in numbers["results"]
    ]
    ends = [row for place in range(len(tables.found["curves"])) for row in tables.rows("curves", place)]
    assert ends == [
        [curve["quantity"], run, f"{end['step']:,}", f"{end['value']:.4g}", f"{end['mean']:.4g}"]
        for curve in numbers["curves"] for run, end in curve["ends"].items()
    ]  # fmt: skip
    drawn = [each[kind] for each in numbers["attention"] for kind in ("by_word", "by_head")]
    for place, maps in enumerate(drawn):
        rows = tables.found["attention"][place]
        assert rows[0] == ["", *maps["columns"]]
        assert rows[1:] == [[row["row"], *(f"{each:.2f}" for each in row["to_all_regions"])] for row in maps["rows"]]
    assert tables.titles == [
        "by region: " + " ".join(f"{weight:.2f}" for weight in weights)
        for maps in drawn for row in maps["rows"] for weights in row["to_regions"]
    ]  # fmt: skip
    assert_probing_agrees(tables, numbers["probing"]["links"])
    asked = numbers["rephrasing"]["runs"]
    if asked:
        assert tables.rows("rephrasing", 0) == [
            [label, *map(as_shown, (run["as_asked"], run["other_forms"], *run["consensus"]))]
            for label, run in asked.items()
        ]
        kinds = next(iter(asked.values()))["by_kind"]
        by_kind = {kind: [each for run in asked.values() for each in run["by_kind"][kind].values()] for kind in kinds}
        assert tables.found["rephrasing"][1][1:] == [
            [kind, f"{each[0]['count']:,}", *map(as_shown, each)] for kind, each in by_kind.items()
        ]
    return numbers


def assert_probing_agrees(tables: Tables, links: list[dict[str, Any]]) -> None:
    largest, differences, *telling, _ = (tables.found["probing"] + [[]])[
        : 2 + len({each["task"] for each in links}) + 1
    ]
    assert [row[3:] for row in largest[1:]] == [
        [
            *(f"{as_shown(run['largest']['weight'])} ({run['largest']['head']})" for run in each["runs"].values()),
            f"{next(iter(each['runs'].values()))['largest']['uniform']:.3f}",
        ]
        for each in links
    ]
    assert [row[3:] for row in differences[1:]] == [
        [as_shown(difference, "+") for difference in each["differences"]] for each in links
    ]
    rows = [row for table in telling for row in table[1:]]
    scores = [(each["direction"], label, run["most_telling"]) for each in links for label, run in each["runs"].items()]
    assert [row[2:] for row in rows] == [
        [
            label, score["head"], as_shown(score["weight"]), as_shown(score["other_region"]),
            as_shown(score["above"], "+"), as_shown(score["right_first"]), f"{score['chance']:.3f}",
            f"{score['weight']['count']:,}",
        ]
        for _, label, score in scores
    ]  # fmt: skip
    labels = list(links[0]["runs"])
    heat = tables.found["probing"][-len(labels) :]
    for label, table in zip(labels, heat, strict=True):
        assert [[float(cell) for cell in row[1:]] for row in table[1:]] == [
            [round(value, 3) for layer in each["runs"][label]["above_by_head"] for value in layer] for each in links
        ]


def parsed(path: Path) -> Sound:
    content = path.read_text(encoding="utf-8")
    found = Sound()
    found.feed(content)
    found.close()
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    for reference in found.references:
        assert reference.startswith("data:image/png;base64,") or reference.removeprefix("#") in found.ids, reference
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "http:" not in content
    assert "https:" not in content
    assert "@import" not in content
    return found


class World:
    """Two pre-training runs and two that answer questions."""

    def __init__(self, shards: Path, root: Path) -> None:
        self.shards, self.root = shards, root
        self.set = shards / "scenes-vqa" / "test"
        self.runs = {
            "pre-uniter": self.train("scenes-pretrain", ("mlm", "itm"), "pre-uniter", PLAIN),
            "pre-villa": self.train("scenes-pretrain", ("mlm", "itm"), "pre-villa", VILLA),
            "uniter": self.train("scenes-vqa", ("vqa",), "uniter", PLAIN),
            "villa": self.train("scenes-vqa", ("vqa",), "villa", VILLA),
        }

    def train(self, data: str, objectives: tuple[str, ...], name: str, phases: Any) -> Path:
        recipe = tiny_recipe(
            self.shards, self.root / name, name=name, model=MODEL,
            data={
                "root": str(self.shards), "sets": {data: f"{data}/train"}, "validation": {data: f"{data}/validation"},
                "tokens": 256, "rows_multiple": 1, "lanes": 1, "window": 256, "workers": 0,
            },
            tasks=[{"data": data, "objective": objective} for objective in objectives],
            phases=phases,
            checkpoints={"every": 4},
        )  # fmt: skip
        train(from_mapping(Recipe, recipe, ""))
        return self.root / name


@pytest.fixture(scope="module")
def world(small_benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(small_benchmark, tmp_path_factory.mktemp("report"))


@pytest.mark.slow  # draws many pictures
def test_four_runs_side_by_side(world: World, tmp_path: Path) -> None:
    out, curves = tmp_path / "new" / "report.html", tmp_path / "curves.png"
    named = [f"{name} <&>={path}" for name, path in world.runs.items()]
    assert main(["report", *named, "--out", str(out), "--set", str(world.set), "--curves", str(curves)]) == 0
    found = parsed(out)
    assert [name for name in found.ids if name in SECTIONS] == SECTIONS
    texts = {name: " ".join(text.split()) for name, text in found.texts.items()}
    for name in world.runs:
        for section in ("compared", "results", "attention", "probing", "made"):
            assert f"{name} <&>" in texts[section], (name, section)
    assert "phases.1.adversary" not in texts["compared"]  # lists of different lengths differ as a whole
    assert "phases" in texts["compared"]
    results = json.loads((world.runs["uniter"] / "results.json").read_text())["scenes-vqa/vqa"]
    assert f"{results['loss']:.4f} {results['score']:.4f} {results['majority_baseline']:.4f}" in texts["results"]
    manifest = load_manifest(str(world.set))
    assert manifest.fingerprint in texts["made"]
    assert f"the first {manifest.num_groups} of {manifest.num_groups} image groups" in texts["made"]
    assert "differ from the model's by at most" in texts["made"]
    assert "subject to object" in texts["probing"]
    assert "villa <&> − uniter <&>" in texts["probing"]
    assert "uniter <&> − pre-uniter <&>" not in texts["probing"]
    assert f"{manifest.num_pairs:,} questions" in texts["rephrasing"]
    assert "CS(4)" in texts["rephrasing"]
    assert texts["attention"].count("Fully lit") == 8  # four texts, each by word and by head
    # two losses of pre-training, one of answering; rate, norm, divergence and text perturbation of each
    assert found.tags.count("img") == 11
    with Image.open(curves) as drawn:
        assert drawn.size[0] > 1000
    numbers = assert_numbers_agree(out)
    assert numbers["set"]["fingerprint"] == manifest.fingerprint
    shown_command = texts["made"].split("what how command ")[1].split(" looked")[0]
    assert (numbers["schema"], numbers["command"]) == (1, shown_command)
    assert {curve["quantity"] for curve in numbers["curves"]} >= {"mlm loss", "vqa loss", "divergence"}
    assert all(run["attention_deviation"] < 1e-4 for run in numbers["runs"].values())


def test_maps_of_stored_texts_on_pictures_of_a_folder(world: World, tmp_path: Path) -> None:
    """As for sets of which nothing is known: the run's own held-out set, texts by id, pictures by name."""
    manifest = load_manifest(str(world.shards / "scenes-vqa" / "validation"))
    identifier = manifest.index["pair_id"][3].decode()
    out = tmp_path / "report.html"
    folder = tmp_path / "pictures"
    shutil.copytree(world.runs["uniter"], tmp_path / "moved")
    (folder / "deep").mkdir(parents=True)
    from villa_ds.data.reader import ShardReader

    name = ShardReader(manifest).sample(3).regions.images[0].name
    Image.new("RGB", (64, 32), (1, 2, 3)).save(folder / "deep" / f"{Path(name).name}.png")
    command = ["report", str(tmp_path / "moved"), "--out", str(out), "--text", identifier, "--images", str(folder)]
    assert main([*command, "--limit", "5"]) == 0
    found = parsed(out)
    assert 'viewBox="0 0 100 50"' in out.read_text()  # the picture's shape
    assert found.texts["attention"].count("Fully lit") == 2
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert [each["text"] for each in numbers["attention"]]
    assert "the first 5 of" in found.texts["made"]
    assert "moved" in found.texts["results"]


def test_what_a_run_lacks_is_said(world: World, tmp_path: Path) -> None:
    run = tmp_path / "bare"
    shutil.copytree(world.runs["pre-uniter"], run)
    for name in ("results.json", "metrics.jsonl"):
        (run / name).unlink()
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out), "--limit", "3", "--maps", "1"]) == 0
    texts = parsed(out).texts
    assert "Not evaluated: bare" in texts["results"]
    assert "no curves" in texts["curves"]
    assert "None of the runs answers questions" in texts["rephrasing"]
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert (numbers["results"], numbers["curves"], numbers["rephrasing"]["runs"]) == ([], [], {})


def test_a_set_of_which_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as anyone's own features: maps on grey, and without the demo's package."""
    for name in [name for name in sys.modules if name.startswith(("easy_vqa", "villa_ds.data.convert.easy_vqa"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("villa_ds.analysis.known", "villa_ds.data.convert.benchmark", "villa_ds.analysis.report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    make_data(tmp_path)
    recipe = tiny_recipe(tmp_path, tmp_path / "run", phases=PLAIN)
    train(from_mapping(Recipe, recipe, ""))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "--out", str(out), "--maps", "2"]) == 0
    texts = parsed(out).texts
    assert "What the images of this set show is not known" in texts["probing"]
    assert texts["attention"].count("Fully lit") == 4
    assert "img00000_0" in texts["attention"]
    assert '<rect width="100" height="100" fill="#8a8f98"/>' in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{uniter}", "{uniter}"], "two runs are called 'uniter': give LABEL=PATH"),
        (["={uniter}"], "give PATH or LABEL=PATH"),
        (["{root}/nothing"], "neither an undamaged checkpoint nor a run directory"),
        (["{uniter}", "--text", "nobody"], "--text 'nobody': "),
        (["{uniter}", "--set", "{shards}/vcr/test"], "trained with another vocabulary"),
        (["{uniter}", "--set", "{root}"], "manifest.json"),
        (["{uniter}", "--out", "."], "--out .: is a folder: give the name of a file in it, such as report.html"),
        (["{uniter}", "--out", "page.json"], "--out page.json: is the page's name, and the numbers go beside it"),
    ],
)
def test_refusals(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {"root": world.root, "shards": world.shards, "uniter": world.runs["uniter"]}
    out = tmp_path / "report.html"
    named = [each.format(**places) for each in arguments]
    assert main(["report", "--out", str(out), *named]) == 2
    captured = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in captured
    assert not out.exists()


def test_a_checkpoint_of_an_earlier_version(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from villa_ds.analysis import runs

    folder = resolve_checkpoint(world.runs["uniter"])
    state = runs.read_run_state(folder)
    del state["inputs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "read_run_state", lambda _: state)
        assert main(["report", str(world.runs["uniter"]), "--out", str(tmp_path / "report.html")]) == 2
    assert "it does not tell its vocabulary and extractor: let the run take" in capsys.readouterr().err


def shown(regions: int = 3, truth: int = 1) -> Shown:
    boxes = np.array([[0.1 * number, 0, 0.1 * number + 0.2, 0.5] for number in range(regions)])
    return Shown("p", ["[CLS]", "red", "[SEP]"], boxes, np.zeros((10, 20, 3), np.uint8), {1: truth})


def test_regions_are_lit_in_proportion() -> None:
    drawn = attention_map(shown(), np.array([0.1, 0.4, 0.0]), strongest=0.2, truth=1)
    assert re.findall(r'clip-path="url\(#p-(\d)\)" opacity="([\d.]+)"', drawn) == [("0", "0.50"), ("1", "1.00")]
    assert 'x="10.0" y="0.0" width="20.0" height="25.0" fill="none"' in drawn  # the truth, in an image twice as wide
    assert definition(shown()).count("<clipPath") == 3
    assert "stroke-width" not in attention_map(shown(), np.array([0.1, 0.4, 0.0]), 0.2, None)


def test_of_many_heads_those_that_attend_to_the_truth_are_shown() -> None:
    probabilities = np.full((12, 12, 6, 6), 0.01, np.float32)
    wanted = [(layer, head) for layer in (2, 7) for head in range(8)]
    for layer, head in wanted:
        probabilities[layer, head, 1, 3 + 1] = 0.2  # to the truth
    probabilities[:, 11, 1, 3] = 0.9  # to another region
    page = drawn_table(shown(), by_head(shown(), {"run": RowAttention(probabilities, 3)}, 1))
    assert re.findall(r"<th>(\d+\.\d+)</th>", page) == [f"{layer + 1}.{head + 1}" for layer, head in wanted]
