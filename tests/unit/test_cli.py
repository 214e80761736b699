"""The command line: parsing, exit codes, one clear line instead of a traceback."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.dist.ranks import REPOSITORY
from tests.runs import make_data, tiny_recipe, write_recipe
from villa_ds import __version__
from villa_ds.cli import main
from villa_ds.config import load_recipe
from villa_ds.errors import EXIT_INTERRUPTED
from villa_ds.trace import trace


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(root: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", tiny_recipe(root, tmp_path / "run"))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def exit_of(*arguments: str) -> int:
    """Where argparse itself ends the program."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_is_instant() -> None:
    """It says what there is, without waiting for torch."""
    program = (
        "import sys\nfrom villa_ds.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules\nassert 'deepspeed' not in sys.modules\n"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    for command in ("shards", "train", "trace"):
        assert f"\n    {command}" in result.stdout


def test_as_a_module() -> None:
    result = python("-m", "villa_ds", "train", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("villa-ds: recipe: 'nowhere.yaml' is neither a file nor one that ships: demo-")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
        (["train"], "the following arguments are required: recipe"),
        (["train", "x.yaml", "--allow-change"], "argument --allow-change: expected one argument"),
        (["train", "x.yaml", "--resume"], "unrecognized arguments: --resume"),
        (["trace", "x.yaml"], "the following arguments are required: --steps"),
        (["trace", "x.yaml", "--steps", "0"], "argument --steps: 0 is not 1 or more"),
        (["trace", "x.yaml", "--steps", "many"], "argument --steps: invalid"),
        (["trace", "x.yaml", "--steps", "1", "--world-size", "0"], "argument --world-size: 0 is not 1 or more"),
        (["shards"], "the following arguments are required: ACTION"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert exit_of(*arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.lans=4", "data.lans: unknown key; known here: root, sets,"),
        ("modle.hidden_size=4", "modle: unknown key; known here: name, output,"),
        ("tasks.0.wieght=2", "tasks.0.wieght: unknown key; known here: data, objective, weight"),
        ("phases.1.adversary.stepz=2", "phases.1.adversary.stepz: unknown key;"),
        ("tasks.9.weight=2", "tasks.9.weight: '9' is not one of the 3 list elements, counted from 0"),
        ("data.lanes", "'data.lanes': an override has the form dotted.key=value"),
        ("data.lanes=two", "data.lanes: expected int, got 'two'"),
        ("data.lanes=0", "data.lanes: 0 does not do: give 1 or more"),
        ("data.lanes=[", "data.lanes: '[' is not YAML"),
        ("seed.x=1", "seed.x: seed is 10, not a group of keys"),
        ("tasks.0.objective=mlmm", "tasks: objective 'mlmm' is not one of gqa, itm, mlm,"),
        ("tasks.0.data=demos", "tasks.0.data: 'demos' does not do: data.sets has ['demo']"),
        ("engine.name=horovod", "engine.name: 'horovod' is not one of torch, deepspeed"),
        ("model.preset=bert", "model.preset: 'bert' is not one of"),
        ("model.num_attention_heads=3", "model.num_attention_heads: 3 heads do not divide model.hidden_size 16"),
        ("data.tokens=8", "data.tokens: 8 does not do: pair "),
        ("engine.precision=float16", "engine.precision: float16 needs loss scaling"),
        ("initialize=nowhere.pt", "initialize: nowhere.pt does not exist: give a run, a checkpoint, a weights file"),
    ],
)
def test_a_wrong_override_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", str(recipe), override]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"villa-ds: {message}")
    assert not list(recipe.parent.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nphase: []\n", "phase: unknown key; known here: name,"),
        ("name: x\n", "tasks: [] does not do: name at least one data set and objective"),
        ("tasks: []\n", "name: missing, give it a value"),
        ("- name\n", "expected a mapping of keys to values"),
        ("name: [\n", "not YAML: "),
        ("name: x\nname: y\n", "name: given 2 times, keep one"),
        ("", "expected a mapping of keys to values"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("villa-ds: ")
    assert message in line
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


def test_options_may_come_before_and_after_overrides(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None of these may be taken for something else; the wrong override shows that all were read."""
    options, override = ["--allow-change", "seed"], "data.lans=4"
    for arguments in (
        ["train", *options, str(recipe), override],
        ["train", str(recipe), override, *options],
        ["--local_rank=0", "train", str(recipe), override],
    ):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith("villa-ds: data.lans: unknown key")


@pytest.mark.parametrize("before", [[], ["seed=4"]])
def test_options_may_come_between_the_recipe_and_overrides(
    recipe: Path, capsys: pytest.CaptureFixture[str], before: list[str]
) -> None:
    assert main(["train", str(recipe), *before, "--allow-change", "seed", "data.lans=4"]) == 2
    assert capsys.readouterr().err.startswith("villa-ds: data.lans: unknown key")


def test_trace_prints_what_the_function_yields(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(recipe), "seed=5", "--steps", "3", "--world-size", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == list(trace(load_recipe(recipe, ["seed=5"]), 3, 2, 0))
    assert len(lines) == 3 * 2
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (MemoryError("Unable to allocate 9 GiB\nfor an array"), "Unable to allocate 9 GiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
            "DefaultCPUAllocator: can't allocate memory: 9",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB"), "CUDA out of memory. Tried 9 GiB"),
    ],
)
def test_too_little_memory_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("villa_ds.train.loop.train", fail)
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err.startswith(f"villa-ds: not enough memory: {said}; lower data.tokens")


@pytest.mark.parametrize(
    ("handler", "arguments", "said"),
    [
        ("cli._evaluate", ["evaluate", "demo-vqa"], "interrupted"),
        ("cli._train", ["train", "demo-vqa"], "interrupted; the same command goes on from the last checkpoint"),
        ("cli_shards._verify", ["shards", "verify", "SET"], "interrupted"),
    ],
)
def test_an_interrupt_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    handler: str,
    arguments: list[str],
    said: str,
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"villa_ds.{handler}", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(arguments) == EXIT_INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one needs no words
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"villa-ds: {said}\n"


def test_on_a_terminal_an_error_takes_the_place_of_the_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["compare", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("\r\x1b[Kvilla-ds: /nowhere")


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, None, "a file or the standard output: No space left on device; mend that, start again"),
        (errno.EEXIST, "a", "a: File exists; mend that, start again"),  # of a folder that is to be made
        (errno.ENOENT, "/proc/x", "/proc/x: No such file or directory; mend that, start again"),
        (errno.EPERM, "a", "a: Operation not permitted; mend that, start again"),
        (errno.EMFILE, None, "too many open files: raise `ulimit -n`, or lower data.workers"),
    ],
)
def test_what_the_disk_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, path: str | None, said: str
) -> None:
    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr("villa_ds.cli._doctor", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"villa-ds: {said}\n"


def test_closed_output_is_no_error(recipe: Path) -> None:
    command = f"'{sys.executable}' -m villa_ds shards stat '{recipe.parent}' >&- 2>&-"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(["bash", "-c", command], env=environment, timeout=60, check=False).returncode == 2


def test_an_estimate_needs_numbers_above_zero(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, number in (("--tflops", "0"), ("--utilisation", "-1"), ("--gpu-memory-gib", "nan")):
        assert exit_of("estimate", str(recipe), option, number) == 2
        assert f"argument {option}: {number} is not a finite number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{recipe}", "output={recipe}"], "{recipe}: Not a directory; mend that, start again"),
        (["evaluate", "{recipe}", "--initial", "checkpoint=x"], "checkpoint=x: --initial asks for the model before"),
    ],
)
def test_what_cannot_be_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([argument.format(recipe=recipe) for argument in arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"villa-ds: {message.format(recipe=recipe)}")


def test_a_reader_that_leaves_is_no_error(recipe: Path) -> None:
    command = f"'{sys.executable}' -m villa_ds trace '{recipe}' --steps 400 | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
