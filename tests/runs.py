"""Whole runs of a tiny model on tiny shards, and what is read back of them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.shards import make_shards
from villa_ds.train.checkpoint import resolve_checkpoint
from villa_ds.train.parameters import KINDS, ParameterFiles

STANDARD, ADVERSARIAL = 7, 5
STEPS = STANDARD + ADVERSARIAL
TIMINGS = ("tokens_per_s", "data_wait_s", "seconds")  # fields of metrics.jsonl that no two runs share

MODEL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 20, "type_vocab_size": 2, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "initializer_range": 0.2,
}  # fmt: skip


def make_data(root: Path) -> Path:
    """46 training pairs in `train`, a held-out set in `held-out`."""
    make_shards(root / "train", groups=24, texts_per_group=2, shards=3)
    make_shards(root / "held-out", groups=5, texts_per_group=2, shards=1, seed=1)
    return root


def tiny_recipe(root: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Standard, then adversarial steps on three objectives with dropout; `changes` replace top-level keys."""
    recipe: dict[str, Any] = {
        "name": "tiny",
        "output": str(output),
        "seed": 10,  # every objective in both phases, an epoch that ends with step 9
        "model": dict(MODEL),
        "data": {
            "root": str(root), "sets": {"demo": "train"}, "validation": {"demo": "held-out"}, "tokens": 128,
            "rows_multiple": 2, "lanes": 2, "window": 16, "workers": 0,
        },
        "tasks": [{"data": "demo", "objective": objective} for objective in ("mlm", "itm", "mrfr")],
        "phases": [
            {"name": "standard", "steps": STANDARD},
            {
                "name": "adversarial", "steps": ADVERSARIAL,
                "adversary": {
                    "steps": 2, "modality": "both", "warmup_steps": 2,
                    "text": {"step_size": 0.2}, "image": {"step_size": 0.5},
                },
            },
        ],
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "clip_norm": 1.0},
        "engine": {"device": "cpu", "threads": 1},
        "checkpoints": {"every": 4},
        "log": {"every": 5, "tensorboard": False},
    }  # fmt: skip
    return recipe | changes


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def metrics_rows(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl; every line must be whole."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything but wall times."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def final_state(directory: Path) -> dict[str, Tensor]:
    """Weights and moments of a run's newest checkpoint (or of a checkpoint) by kind and name."""
    files = ParameterFiles(resolve_checkpoint(directory))
    return {f"{kind}/{name}": files.get(kind, name) for kind in KINDS for name in files.names}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit."""
    assert left.keys() == right.keys()
    return [name for name, value in left.items() if bits(value) != bits(right[name])]


def bits(tensor: Tensor) -> tuple[str, bytes]:
    """Type and content; equal for equal NaNs, and 0.0 is not -0.0."""
    return str(tensor.dtype), tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same_run(directory: Path, reference: Path) -> None:
    """Every metric of every step, and the final weights and moments, bit for bit; each step once."""
    found, expected = numbers(metrics_rows(directory)), numbers(metrics_rows(reference))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == wanted
    assert differing(final_state(directory), final_state(reference)) == []
