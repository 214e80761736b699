"""Learning-rate schedules of the reference, every table entry."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.golden import documents
from villa_ds.config import OptimizerConfig
from villa_ds.train.optim import learning_rate, linear, noam, vqa_steps


def release_rate(step: int, entry: dict[str, Any]) -> float:
    config = OptimizerConfig(learning_rate=entry["learning_rate"], warmup_steps=entry["warmup_steps"])
    return learning_rate(step, config, entry["num_train_steps"])


SCHEDULES: dict[str, Callable[[int, dict[str, Any]], float]] = {
    "warmup_linear": lambda step, entry: linear(step, entry["warmup_step"], entry["tot_step"]),
    "noam": lambda step, entry: noam(step, entry["warmup_step"]),
    "vqa": lambda step, entry: vqa_steps(
        step, entry["warmup_interval"], entry["decay_interval"], entry["decay_start"], entry["decay_rate"]
    ),
    "get_lr_sched": release_rate,
}
TABLES = [
    pytest.param(schedule, entry, id=f"{document.id}/{schedule}{position}")
    for document in documents("schedules.json")
    for schedule, entries in document.values[0].items()
    if isinstance(entries, list)
    for position, entry in enumerate(entries)
]


@pytest.mark.parametrize(("schedule", "entry"), TABLES)
def test_table(schedule: str, entry: dict[str, Any]) -> None:
    steps = [step for step, _ in entry["table"]]
    computed = [SCHEDULES[schedule](step, entry) for step in steps]
    assert computed == pytest.approx([value for _, value in entry["table"]], rel=1e-12, abs=0)
