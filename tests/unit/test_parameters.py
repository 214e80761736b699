"""The state of training by parameter: written in shares, read whole, refused where it does not fit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter

from tests.tiny import tiny_module
from villa_ds.errors import CheckpointError
from villa_ds.train.parameters import KINDS, ParameterFiles, snapshot_parameters, tied_names


def value_of(parameter: Parameter, kind: str) -> Tensor:
    """Another number for every kind."""
    return parameter.detach() * (1 + KINDS.index(kind))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_round_trip_over_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    module = tiny_module("mlm", "mrfr", dtype=torch.float32)
    for rank in range(world):
        snapshot_parameters(module, value_of, updates=17, rank=rank, world=world)(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"state-{rank:05d}-of-{world:05d}.safetensors" for rank in range(world)
    ]
    files = ParameterFiles(tmp_path)
    assert files.updates == 17
    expected = dict(module.named_parameters())
    assert sorted(files.names) == sorted(expected)
    for name, parameter in expected.items():
        for kind in KINDS:
            assert torch.equal(files.get(kind, name), value_of(parameter, kind)), (kind, name)
    files.require_fit((name, tuple(parameter.shape)) for name, parameter in expected.items())


def test_each_rank_writes_about_an_equal_number_of_parameters(tmp_path: Path) -> None:
    module = tiny_module("mlm", dtype=torch.float32)
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        snapshot_parameters(module, value_of, updates=0, rank=rank, world=2)(folder)
    shares = [names_in(tmp_path / str(rank) / f"state-{rank:05d}-of-00002.safetensors") for rank in range(2)]
    assert shares[0] & shares[1] == set()
    assert shares[0] | shares[1] == dict(module.named_parameters()).keys()
    assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_all_ranks_ask_for_every_value_in_the_same_order(tmp_path: Path) -> None:
    """Gathering a partitioned parameter is collective: a rank that asks for its own share only would hang."""
    module = tiny_module("mlm", dtype=torch.float32)
    asked: list[list[tuple[int, str]]] = [[], []]
    for rank in range(2):

        def get(parameter: Parameter, kind: str, rank: int = rank) -> Tensor:
            asked[rank].append((id(parameter), kind))
            return parameter.detach()

        snapshot_parameters(module, get, updates=0, rank=rank, world=2)(tmp_path)
    assert asked[0] == asked[1]
    assert len(asked[0]) == len(KINDS) * len(list(module.parameters()))


def test_tied_parameters_are_stored_once_and_come_back_under_every_name(tmp_path: Path) -> None:
    module = tiny_module("mlm", "mrfr", dtype=torch.float32)
    state = module.state_dict()
    tied = tied_names(module)
    assert sorted(tied.values()) == [
        "uniter.embeddings.word_embeddings.weight", "uniter.img_embeddings.img_linear.weight"
    ]  # fmt: skip
    snapshot_parameters(module, value_of, updates=0, rank=0, world=1)(tmp_path)
    files = ParameterFiles(tmp_path)
    assert not set(tied) & set(files.names)
    restored = files.state_dict()
    assert sorted(restored) == sorted(state)
    for name, value in state.items():
        assert torch.equal(restored[name], value), name


def test_wide_values_stay_wide(tmp_path: Path) -> None:
    module = nn.Linear(3, 2).double()
    snapshot_parameters(module, value_of, updates=0, rank=0, world=1)(tmp_path)
    assert ParameterFiles(tmp_path).get("weight", "bias").dtype == torch.float64


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        ParameterFiles(tmp_path)
    assert str(caught.value) == f"{tmp_path}: holds no state-*.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "parameter bias is not in this model: the checkpoint is of another model"),
        ({"extra": (1,)}, "parameter extra is not in the checkpoint: the checkpoint is of another model"),
        ({"weight": (2, 4)}, "parameter weight is [2, 3] in the checkpoint and [2, 4] in this model"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str) -> None:
    snapshot_parameters(nn.Linear(3, 2), value_of, updates=0, rank=0, world=1)(tmp_path)
    shapes: dict[str, tuple[int, ...] | None] = {"weight": (2, 3), "bias": (2,)}
    wanted = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(CheckpointError) as caught:
        ParameterFiles(tmp_path).require_fit(wanted.items())
    assert str(caught.value) == message


FIRST, SECOND = "state-00000-of-00002.safetensors", "state-00001-of-00002.safetensors"


def names_in(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118 (not a mapping)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Change the tensors or the metadata of a file."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank's file is missing": (
        lambda folder: (folder / FIRST).unlink(), "the files of the ranks do not belong together or are not all there"
    ),
    "files of two worlds": (
        lambda folder: shutil.copy(folder / FIRST, folder / "state-00002-of-00003.safetensors"),
        "do not belong together",
    ),
    "a file that is no number": (
        lambda folder: (folder / FIRST).rename(folder / "state-x-of-00002.safetensors"), "do not belong together"
    ),
    "the same file twice": (
        lambda folder: shutil.copy(folder / FIRST, folder / SECOND), "weight twice; use an earlier checkpoint"
    ),
    "of another number of updates": (
        lambda folder: rewrite(folder / SECOND, lambda _, metadata: metadata.update(updates="8")),
        f"{SECOND}: of another checkpoint than ",
    ),
    "torn": (lambda folder: (folder / SECOND).write_bytes(b"\xff" * 100), f"{SECOND}: cannot be read: "),
    "a moment is missing": (
        lambda folder: rewrite(folder / FIRST, lambda tensors, _: tensors.__delitem__("exp_avg/weight")),
        "is no weight with its moments",
    ),
    "a moment of another shape": (
        lambda folder: rewrite(folder / FIRST, lambda tensors, _: tensors.update({"exp_avg/weight": torch.ones(3)})),
        "exp_avg/weight is no weight with its moments",
    ),
    "whole numbers": (
        lambda folder: rewrite(
            folder / FIRST, lambda tensors, _: tensors.update({"weight/weight": torch.ones(2, 3).int()})
        ),
        "weight/weight is no weight",
    ),
    "of no kind that is known": (
        lambda folder: rewrite(folder / FIRST, lambda tensors, _: tensors.update({"x" * 500: torch.ones(1)})),
        "'" + "x" * 77 + "'... is no weight",
    ),
    **{
        f"metadata {key} {value!r}": (
            lambda folder, key=key, value=value: [  # type: ignore[misc]
                rewrite(folder / name, lambda _, metadata: metadata.update({key: value})) for name in (FIRST, SECOND)
            ],
            f"{FIRST}: its metadata is not that of a checkpoint",
        )
        for key, value in (
            ("updates", "many"), ("updates", "-1"), ("tied", "["), ("tied", "[]"), ("tied", '{"more": "no such name"}'),
            ("tied", '{"weight": "bias"}'), ("tied", "[" * 100_000), ("loss_scale", "1"),
            ("loss_scale", '{"scale": NaN, "calm": 1, "patience": 1}'),
            ("loss_scale", '{"scale": 2.0, "calm": -1, "patience": 1}'), ("loss_scale", '{"scale": 2.0}'),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, kind: str) -> None:
    """Their checksums are looked at first; this is the second line."""
    for rank in range(2):
        snapshot_parameters(nn.Linear(3, 2), value_of, updates=7, rank=rank, world=2)(tmp_path)
    assert ParameterFiles(tmp_path).updates == 7
    spoil, message = SPOILT[kind]
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ParameterFiles(tmp_path)
    assert message in str(caught.value)
