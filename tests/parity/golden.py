"""Golden cases: outputs of the original UNITER and VILLA code (tests/golden/FACTS.md gives their schema).

Cases are found by what a folder holds, under `tests/golden` or the folder named by VILLA_DS_GOLDEN; no test knows a
case's name or numbers. `Expectations` fails when a stored array was never compared.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(os.environ.get("VILLA_DS_GOLDEN", Path(__file__).parents[1] / "golden"))
DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Case:
    """One folder with a `case.json`."""

    folder: Path

    @cached_property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        return spec

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        with np.load(self.folder / f"{name}.npz") as stored:
            return {key: stored[key] for key in stored.files}

    def inputs(self, dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
        """Inputs as tensors, floats in `dtype`; with `prefix`, only the names that start with it, without it."""
        return {
            key.removeprefix(prefix): torch.from_numpy(value).to(dtype if value.dtype.kind == "f" else None)
            for key, value in self.arrays("inputs").items()
            if key.startswith(prefix)
        }

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The reference's state dict, floats in `dtype`."""
        return {key: value.to(dtype) for key, value in load_file(self.folder / "weights.safetensors").items()}

    def expectations(self, dtype: torch.dtype) -> "Expectations":
        return Expectations(self, dtype)


class Expectations:
    """Expected arrays of a case, each to be compared once; use as a context manager."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._arrays = case.arrays("expected")
        self._spec = case.spec["expected"] if isinstance(case.spec["expected"], dict) else {}
        self._open = set(self._arrays)
        for name, entry in self._spec.items():
            array = self._arrays[name]
            assert list(array.shape) == entry["shape"], f"{name}: shape differs from case.json"
            if "max_abs" in entry and array.size:
                np.testing.assert_allclose(
                    np.abs(array).max(), entry["max_abs"], rtol=1e-12, err_msg=f"{name}: max_abs"
                )

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names that start with `prefix`, in stored order."""
        return (name for name in self._arrays if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def peek(self, name: str) -> NDArray[Any]:
        """The stored array, not counted as compared."""
        return self._arrays[name]

    def check(self, name: str, actual: Tensor | NDArray[Any] | float, where: Tensor | None = None) -> None:
        """Compare within the case's tolerance; `where` limits it to meaningful positions (leading axes)."""
        expected = self._arrays[name]
        values = actual.detach().to(torch.float64).numpy() if isinstance(actual, Tensor) else np.asarray(actual)
        assert values.shape == expected.shape, f"{name}: shape {values.shape}, expected {expected.shape}"
        if where is not None:
            values, expected = values[where.numpy()], expected[where.numpy()]
        if self._dtype == torch.float64:
            rtol, atol = 1e-6, 1e-8
        else:
            rtol, atol = 2e-3, 10 * self._spec.get(name, {}).get("fp32_run_max_abs_diff", 0.0) + 1e-6
        np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol, err_msg=name)
        self._open.discard(name)

    def __enter__(self) -> "Expectations":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self._open, f"never compared: {sorted(self._open)}"


def cases(*kinds: str) -> list[Any]:
    """`pytest.param`s of every case folder of these kinds."""
    found = (Case(path.parent) for path in sorted(ROOT.glob("*/case.json")))
    return [pytest.param(case, id=case.folder.name) for case in found if case.spec["kind"] in kinds]


def documents(pattern: str) -> list[Any]:
    """`pytest.param`s of every JSON document ``*/pattern`` of folders without a case.json, parsed."""
    paths = (path for path in sorted(ROOT.glob(f"*/{pattern}")) if not (path.parent / "case.json").exists())
    return [pytest.param(json.loads(path.read_text()), id=f"{path.parent.name}/{path.stem}") for path in paths]
