"""Measurements as tables: nothing is lost, nothing is invented, special characters survive."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekiln.errors import UsageError
from imagekiln.metrics import Measurement, Provenance
from imagekiln.metrics.tables import CSV_FIELDS, HEAD, KINDS, table

numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
names = st.text(st.characters(codec="utf-8", exclude_characters="\r\n", exclude_categories=("Cs", "Cc")), max_size=20)
measurements = st.builds(
    Measurement,
    metric=names,
    value=numbers,
    n=st.integers(1, 10**6),
    n_reference=st.integers(1, 10**6),
    provenance=st.builds(Provenance, features=names, reference=names),
    low=maybe,
    high=maybe,
    floor=maybe,
    ratio=maybe,
)


@given(st.lists(measurements, max_size=4))
def test_csv_gives_every_number_back_exactly(rows: list[Measurement]) -> None:
    found = list(csv.DictReader(io.StringIO(table(rows, "csv"))))
    assert len(found) == len(rows)
    for row, cells in zip(rows, found, strict=True):
        assert list(cells) == list(CSV_FIELDS)
        for name in ("value", "low", "high", "floor", "ratio"):
            expected = getattr(row, name)
            assert cells[name] == "" if expected is None else float(cells[name]) == expected
        assert (cells["metric"], cells["features"]) == (row.metric, row.provenance.features)


@given(st.lists(measurements, min_size=1, max_size=4))
def test_rows_and_columns_agree_in_every_kind(rows: list[Measurement]) -> None:
    markdown = table(rows, "markdown").split("\n")
    assert len(markdown) == len(rows) + 2
    assert all(line.replace("\\|", "").count("|") == len(HEAD) + 1 for line in markdown)
    latex = table(rows, "latex").split("\n")
    body = latex[4:-2]
    assert len(body) == len(rows) and all(line.endswith(r" \\") for line in body)
    assert all(line.replace(r"\&", "").count("&") == len(HEAD) - 1 for line in body)
    assert len(table(rows).split("\n")) == len(rows) + 2


def test_no_interval_is_an_empty_cell_not_a_zero() -> None:
    row = Measurement("mse", 0.25, 10, 10, Provenance("pixels"))
    assert table([row], "markdown").split("\n")[2] == "| mse[pixels] | 0.25 |  |  |  | 10 |"


def test_latex_escapes() -> None:
    row = Measurement("copy_ratio", 1.0, 10, 10, Provenance("a\\b%"), low=0.5, high=1.5)
    line = table([row], "latex").split("\n")[4]
    assert r"copy\_ratio[a\textbackslash{}b\%]" in line and "0.5--1.5" in line


def test_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'csv'"):
        table([], "cvs")
    assert set(KINDS) == {"text", "csv", "markdown", "latex"}
