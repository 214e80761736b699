"""Metrics: sums divided once, rows cut back to the checkpoint, TensorBoard without a step twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from villa_ds.train.metrics import MetricsLog, SumTable, cut_metrics, means_of


def pair(total: float, count: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(total), torch.tensor(count)


def table(**pairs: tuple[float, float]) -> SumTable:
    sums = SumTable()
    sums.add({name: pair(*values) for name, values in pairs.items()})
    return sums


def same(values: Tensor) -> Tensor:
    return values


def open_log(
    directory: Path, start: int = 0, total: int = 20, every: int = 3, rank: int = 0, **options: Any
) -> MetricsLog:
    settings = {"tensorboard": False, "reduce": same} | options
    return MetricsLog(directory, start_step=start, total_steps=total, every=every, rank=rank, **settings)


def fields(step: int, **more: Any) -> dict[str, Any]:
    values = {"lr": 0.5, "grad_norm": 2.0, "seconds": 2.0, "data_wait_s": 0.0, "passes": 2}
    return {"step": step, "phase": "standard", "objective": "mlm", **values, **more}


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(directory / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_mean_is_the_sum_over_the_count_and_not_a_mean_of_means() -> None:
    sums = SumTable()
    sums.add({"loss": pair(10.0, 2.0), "accuracy": pair(1.0, 4.0)})
    sums.add({"loss": pair(2.0, 6.0)})
    assert sums.names == ["accuracy", "loss"]
    assert sums.flat().tolist() == [1.0, 4.0, 12.0, 8.0]
    assert sums.means(same) == {"accuracy": 0.25, "loss": 1.5}


def test_what_counted_nothing_is_left_out() -> None:
    assert table(loss=(3.0, 2.0), score=(0.0, 0.0)).means(same) == {"loss": 1.5}
    assert means_of(["a", "b"], [1.0, 0.0, 6.0, 3.0]) == {"b": 2.0}
    assert SumTable().means(same) == {}


def test_sums_are_reduced_before_they_are_divided() -> None:
    """Another rank has the sum 9 of 3 items: the mean is 12 / 5, not that of 1.5 and 3."""
    other = table(loss=(9.0, 3.0)).flat()
    assert table(loss=(3.0, 2.0)).means(lambda flat: flat + other) == {"loss": 2.4}


def test_sums_stay_exact_over_many_small_ones_and_carry_no_graph() -> None:
    sums = SumTable()
    weight = torch.tensor(0.1, dtype=torch.float32, requires_grad=True)
    for _ in range(1000):
        sums.add({"loss": (weight * 1, torch.tensor(1.0))})
    assert not sums.flat().requires_grad
    assert sums.means(same)["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_every_step_is_a_row_though_the_device_is_read_every_third(tmp_path: Path) -> None:
    reads = []

    def reduce(flat: Tensor) -> Tensor:
        reads.append(flat.tolist())
        return flat * 2  # two ranks that saw the same

    log = open_log(tmp_path, every=3, total=5, reduce=reduce)
    for step in range(1, 6):
        log.record(fields(step), table(loss=(float(step), 2.0)), 20)
        assert [row["step"] for row in rows(tmp_path)] == list(range(1, step // 3 * 3 + 1 if step < 5 else 6))
    log.close()
    assert reads == [[20.0, 1.0, 2.0, 20.0, 2.0, 2.0, 20.0, 3.0, 2.0], [20.0, 4.0, 2.0, 20.0, 5.0, 2.0]]
    speed = {"tokens": 40, "tokens_per_s": 20.0}  # of both ranks, in two seconds
    assert rows(tmp_path) == [fields(step, **speed, losses={"loss": step / 2}) for step in range(1, 6)]


def test_closing_writes_what_is_pending(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.record(fields(1), table(loss=(1.0, 1.0)), 20)
    assert rows(tmp_path) == []
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_other_ranks_reduce_and_write_nothing(tmp_path: Path) -> None:
    reads = []

    def reduce(flat: Tensor) -> Tensor:
        reads.append(flat.tolist())
        return flat

    log = open_log(tmp_path, rank=1, reduce=reduce, tensorboard=True)
    for step in range(1, 4):
        log.record(fields(step), table(loss=(1.0, 1.0)), 20)
    log.event(3, "validation/x", {"loss": 1.0})
    log.close()
    assert reads == [[20.0, 1.0, 1.0] * 3]
    assert list(tmp_path.iterdir()) == []


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "losses": {"loss": 1.0}}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("content", "last_step", "kept"),
    [
        (lines(1, 2, 3, 4), 2, lines(1, 2)),
        (lines(1, 2, 3, 4), 4, lines(1, 2, 3, 4)),
        (lines(1, 2, 3, 4), 9, lines(1, 2, 3, 4)),
        (lines(1, 2, 3, 4), 0, ""),
        (lines(1, 2) + lines(3)[:17], 3, lines(1, 2)),
        (lines(1, 2, 3)[:-1], 3, lines(1, 2, 3)),  # only the newline is missing
        (lines(1) + lines(2)[:5] + "\n" + lines(3), 3, lines(1)),  # nothing counts behind a torn line
        (lines(1, 2) + "\0" * 30, 3, lines(1, 2)),  # as file systems fill up after a power cut
        ("", 3, ""),
    ],
)
def test_cut_keeps_whole_lines_up_to_the_checkpoint(tmp_path: Path, content: str, last_step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    cut_metrics(path, last_step)
    assert path.read_text() == kept
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_copes_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2).encode() + b"\xff\xfe\x00")
    cut_metrics(path, 5)
    assert path.read_text() == lines(1, 2)


def test_cut_of_no_file_makes_none(tmp_path: Path) -> None:
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def run_steps(directory: Path, start: int, stop: int, offset: float) -> None:
    """An earlier or later process of the same run; `offset` tells their values apart."""
    log = open_log(directory, start=start, every=2, tensorboard=True)
    for step in range(start + 1, stop + 1):
        log.record(fields(step, lr=step + offset), table(loss=(step + offset, 1.0)), 20)
        if step % 3 == 0:
            log.event(step, "validation/demo/mlm", {"loss": step + offset})
    log.close()


def test_after_a_resume_no_step_appears_twice(tmp_path: Path) -> None:
    """Killed after step 8 with a checkpoint of step 4, then after 6 with one of 5."""
    run_steps(tmp_path, 0, 8, 0.0)
    run_steps(tmp_path, 4, 6, 0.25)
    run_steps(tmp_path, 5, 10, 0.5)
    expected = [(step, step + (0.0 if step < 5 else 0.25 if step == 5 else 0.5)) for step in range(1, 11)]
    assert [(row["step"], row["lr"]) for row in rows(tmp_path)] == expected
    assert [(row["step"], row["losses"]["loss"]) for row in rows(tmp_path)] == expected
    shown = scalars(tmp_path)
    assert shown["mlm/loss"] == expected
    assert shown["train/lr"] == expected
    assert shown["validation/demo/mlm/loss"] == [(3, 3.0), (6, 6.5), (9, 9.5)]
    assert set(shown) == {"mlm/loss", "validation/demo/mlm/loss"} | {
        f"train/{name}" for name in ("lr", "grad_norm", "tokens_per_s", "data_wait_s", "passes")
    }


def test_a_start_from_the_beginning_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    run_steps(tmp_path, 0, 3, 0.0)
    run_steps(tmp_path, 0, 2, 0.5)
    assert [row["lr"] for row in rows(tmp_path)] == [1.5, 2.5]
    shown = scalars(tmp_path)
    assert shown["mlm/loss"] == [(1, 1.5), (2, 2.5)]
    assert "validation/demo/mlm/loss" not in shown or shown["validation/demo/mlm/loss"] == []
