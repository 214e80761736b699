"""The commands on remote sets: the same as on folders."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import final_state, make_data, metrics_rows, numbers, tiny_recipe, write_recipe
from tests.servers import Server, serve
from villa_ds.cli import main
from villa_ds.data.statistics import stat


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("sets"))


@pytest.fixture
def server(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VILLA_DS_CACHE", str(tmp_path / "cache"))
    with serve(root) as served:
        yield served


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_verify_and_stat(server, root, capsys):
    for command in (["verify"], ["verify", "--sample", "5"], ["stat"]):
        code, local = run(capsys, "shards", *command, str(root / "train"))
        assert code == 0
        code, remote = run(capsys, "shards", *command, f"{server.url}/train")
        assert code == 0
        timeless = [re.sub(r"in \d+\.\d s", "", text) for text in (local, remote)]
        assert timeless[1] == timeless[0].replace(str(root), server.url)


def test_stat_of_a_remote_set_fetches_few_shards(server, monkeypatch):
    monkeypatch.setattr("villa_ds.data.statistics._FETCHED_SHARDS", 2)
    found = stat(f"{server.url}/train")
    assert sorted(request.name for request in server.requests if request.name.endswith(".tar")) == [
        "train/shard-000000.tar", "train/shard-000001.tar",
    ]  # fmt: skip
    assert (found.sampled, found.sampled_shards) == (16, 2)
    assert "(in 16 groups of 2 shards)" in str(found)


def test_verify_finds_damage_there_and_mends_damage_here(server, root, tmp_path, capsys, monkeypatch):
    url = f"{server.url}/train"
    assert run(capsys, "shards", "verify", url)[0] == 0
    manifest = json.loads((root / "train" / "manifest.json").read_text())
    (copy,) = (tmp_path / "cache").rglob(manifest["shards"][1]["sha256"])
    content = copy.read_bytes()
    copy.write_bytes(content[:5000] + b"x" + content[5001:])
    assert run(capsys, "shards", "verify", url)[0] == 0
    assert copy.read_bytes() == content
    copy.write_bytes(b"x" + content[1:])
    monkeypatch.setattr(server, "fault", lambda name, number: None)
    (tmp_path / "other").mkdir()
    for path in (root / "train").iterdir():
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other" / "shard-000001.tar").write_bytes(content[:-1])
    server.folder = tmp_path / "other"
    code, text = run(capsys, "shards", "verify", server.url)
    assert code == 3
    assert "shard-000001.tar: has 24064 bytes" in text or re.search(r"shard-000001\.tar: has \d+ bytes, the man", text)


def test_trace(server, root, tmp_path, capsys):
    path = str(write_recipe(tmp_path / "tiny.yaml", tiny_recipe(root, tmp_path / "run")))
    code, local = run(capsys, "trace", path, "--steps", "6", "--world-size", "2")
    assert code == 0
    assert run(capsys, "trace", path, "--steps", "6", f"data.root={server.url}", "--workers", "1") == (0, local)
    piped = f"data.root=pipe:cat {root}/{{name}}"
    assert run(capsys, "trace", path, "--steps", "6", piped) == (0, local)


@pytest.mark.slow
def test_train_and_evaluate(server, root, tmp_path, capsys):
    places = {"here": str(root), "there": server.url}
    results = {}
    for name, place in places.items():
        recipe = str(write_recipe(tmp_path / f"{name}.yaml", tiny_recipe(root, tmp_path / name)))
        assert run(capsys, "train", recipe, f"data.root={place}")[0] == 0
        assert run(capsys, "evaluate", recipe, f"data.root={place}")[0] == 0
        (written,) = (tmp_path / name / "evaluation").iterdir()
        results[name] = json.loads((written / "metrics.json").read_text())
    assert numbers(metrics_rows(tmp_path / "there")) == numbers(metrics_rows(tmp_path / "here"))
    assert results["there"] == results["here"]
    here, there = final_state(tmp_path / "here"), final_state(tmp_path / "there")
    assert all((there[key] == value).all() for key, value in here.items())


def test_an_unreachable_set_ends_with_2_and_one_line(tmp_path, root, capsys, monkeypatch):
    monkeypatch.setattr("villa_ds.data.store._FIRST_WAIT_S", 0.001)
    path = str(write_recipe(tmp_path / "tiny.yaml", tiny_recipe(root, tmp_path / "run")))
    code, text = run(capsys, "train", path, "data.root=http://127.0.0.1:9/sets", "data.retries=1")
    assert code == 2
    assert text.splitlines()[-1].startswith("villa-ds: http://127.0.0.1:9/sets/train/manifest.json: ")
    assert text.splitlines()[-1].endswith("(attempts: 2); see that the address is right and the server can be reached "
                                          "from here, start again")  # fmt: skip


def test_to_npz(server, root, tmp_path, capsys):
    assert run(capsys, "shards", "to-npz", f"{server.url}/train", str(tmp_path / "there"))[0] == 0
    assert run(capsys, "shards", "to-npz", str(root / "train"), str(tmp_path / "here"))[0] == 0
    files = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def test_doctor_tells_where_the_cache_is(server, tmp_path, capsys):
    stat(f"{server.url}/train")
    code, text = run(capsys, "doctor")
    assert code == 0
    (line,) = [line for line in text.splitlines() if line.startswith("cache of remote shards")]
    assert line == f"cache of remote shards: {tmp_path}/cache (or data.cache), 10 files and 0 begun, 0.0 GiB"
