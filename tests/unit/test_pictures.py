"""The project's look, and files that are the same every time."""

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image as Picture

from villa_ds.pictures import DPI, PANEL, mark, picture, thousands


def drawn(path, subtitle="what it is of", value=7000.0):
    with picture(path, "A title", subtitle, panels=2) as (left, right):
        left.plot([0, 10_000], [5000, 0])
        left.plot([0, 10_000], [0, 5000])
        right.set_xlim(0, 10_000)
        mark(right, value, "here", 0)
        thousands(left.xaxis)
        labels = [left.xaxis.get_major_formatter()(value) for value in (0, 10_000)]
        sides = [text.get_ha() for text in right.texts]
    return labels, sides


def test_equal_drawings_are_equal_files_whatever_this_machine_is_set_to(tmp_path):
    assert drawn(tmp_path / "a" / "one.png") == (["0", "10,000"], ["left"])
    with mpl.rc_context({"figure.facecolor": "black", "lines.linewidth": 9}):
        drawn(tmp_path / "a" / "two.png")
        assert mpl.rcParams["lines.linewidth"] == 9  # nor does a picture change the settings of others
    assert (tmp_path / "a" / "one.png").read_bytes() == (tmp_path / "a" / "two.png").read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["one.png", "two.png"]
    with Picture.open(tmp_path / "a" / "one.png") as found:
        assert found.size[0] == round(2 * PANEL[0] * DPI)
        assert "Software" not in found.info
        image = np.asarray(found.convert("RGB"))
    red = (image == (0xD5, 0x5E, 0x00)).all(axis=2)
    assert red.any()  # the second line has the palette's second colour by itself
    assert not red[:, image.shape[1] // 2 :].any()  # the left panel's line


def test_a_label_near_the_right_end_goes_to_the_left(tmp_path):
    assert drawn(tmp_path / "one.png", value=9000.0)[1] == ["right"]


def test_a_drawing_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "one.png", "A title"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
