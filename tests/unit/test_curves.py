"""Training curves: what is drawn of metrics.jsonl, and how it is smoothed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from villa_ds.analysis.curves import SPAN, draw, panels_of, smooth
from villa_ds.errors import ConfigError
from villa_ds.pictures import DPI, PALETTE, PANEL


def row(
    step: int, loss: float | None, objective: str = "mlm", phase: str = "standard", **more: float
) -> dict[str, Any]:
    losses = {"loss": loss, **more}
    return {"step": step, "phase": phase, "objective": objective, "lr": 0.1 / step, "grad_norm": 1.0, "losses": losses}


def test_smoothing_is_a_weighted_mean_of_both_sides() -> None:
    steps, values = np.array([1, 2, 4, 9, 10]), np.array([5.0, 1.0, 0.0, 2.0, 8.0])
    weights = np.exp(-np.abs(steps[:, None] - steps) / 3.0)
    np.testing.assert_allclose(smooth(steps, values, 3.0), (weights @ values) / weights.sum(1))
    np.testing.assert_allclose(smooth(steps, np.full(5, 7.0), 3.0), 7.0)
    assert smooth(np.array([], np.int64), np.array([]), 3.0).shape == (0,)
    many = np.arange(1, 200_001)
    np.testing.assert_allclose(smooth(many, many.astype(float), 5000.0)[100_000], 100_001, rtol=1e-6)  # no lag


def test_panels_and_their_phases() -> None:
    plain = [row(1, 4.0), row(2, 1.0, "itm"), row(3, None), row(4, 2.0)]
    late = {"kl": 0.5, "text_perturbation_norm": 0.03, "regions_perturbation_norm": 0.15}
    villa = [row(1, 4.0), row(2, 1.0, "itm"), row(3, 3.0, phase="adversarial", **late)]
    panels = panels_of({"UNITER": plain, "VILLA": villa, "nothing yet": []})
    assert [(panel.name, [series.run for series in panel.series]) for panel in panels] == [
        ("mlm loss", ["UNITER", "VILLA"]),
        ("itm loss", ["UNITER", "VILLA"]),
        ("learning rate", ["UNITER", "VILLA"]),
        ("gradient norm", ["UNITER", "VILLA"]),
        ("divergence", ["VILLA"]),
        ("text perturbation", ["VILLA"]),
        ("region perturbation", ["VILLA"]),
    ]
    mlm, kl = panels[0], panels[4]
    assert [series.steps.tolist() for series in mlm.series] == [[1, 4], [1, 3]]  # what is null was not finite
    assert [series.values.tolist() for series in mlm.series] == [[4.0, 2.0], [4.0, 3.0]]
    assert (kl.series[0].steps.tolist(), kl.series[0].values.tolist()) == ([3], [0.5])
    assert {panel.phases for panel in panels} == {((3, "adversarial"),)}
    long = panels_of({"a": [row(step, 1.0) for step in range(1, 401)]})
    assert long[0].series[0].span == 400 / SPAN
    assert long[0].phases == ()


def test_several_runs_in_one_picture(tmp_path: Path) -> None:
    runs = {"UNITER": [row(step, 5 / step) for step in range(1, 60)]}
    runs["VILLA"] = [row(step, 7 / step, phase="a" if step < 30 else "b", kl=0.1) for step in range(1, 60)]
    path = draw(runs, tmp_path / "curves.png")
    with Image.open(path) as found:
        pixels = np.asarray(found.convert("RGB")).astype(int)
    assert pixels.shape[1] == round(3 * PANEL[0] * DPI)  # four panels, three in a row
    height = pixels.shape[0] // 2
    wanted = [np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) for colour in PALETTE[:2]]
    first_row, second_row = pixels[:height], pixels[height + 100 :]  # between them, legends
    for colour, rows in zip(wanted, (first_row, first_row), strict=True):
        assert (np.abs(rows - colour).max(-1) < 12).sum() > 200
    assert (np.abs(second_row[:, pixels.shape[1] // 3 :] - wanted[1]).max(-1) < 12).sum() == 0  # empty places
    assert path.stat().st_size < 150_000


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no optimizer step"):
        draw({"a": [], "b": []}, tmp_path / "curves.png")
