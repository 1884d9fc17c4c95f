"""What a person reads while a model trains."""

from __future__ import annotations

import io

import pytest

from imagekiln.engine.tracker import Console


@pytest.mark.parametrize(
    ("nimg", "begins", "ends"),
    [(500, " 25%  500 images  10 img/s", "2 min 30 s left"), (2048, "100%  2,048 images", " 0 s left")],
)
def test_a_line_says_how_far_and_how_long_also_when_the_last_step_went_beyond(
    nimg: int, begins: str, ends: str
) -> None:
    stream = io.StringIO()
    row = {"nimg": nimg, "total_nimg": 2000, "img_per_sec": 10.0, "peak_mem_gb": 0.5, "denoise/loss": 0.25}
    Console(stream).tick(row)
    line = stream.getvalue()
    assert line.startswith(begins) and ends in line and "denoise 0.25" in line and "-" not in line.split("ends")[0]
