"""Row and Table: a value or a reason, and the same rows after every round trip."""

import csv
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from transect.errors import InputError
from transect.results import COLUMNS, Row, Table, to_line

FULL = Row(
    metric="r2_heldout", value=0.1 + 0.2, unit="1", study="s", run="r", model="m, \"q\"\n", revision="main", step=3,
    tokens=2**40 + 1, seconds=1.5, flops=1e20, probe="nonlinearity", layer=0, layer_to=5, site="resid", element="ffn",
    part="head", domain="d", task="t", edit="swap", variant="pre_norm/all", stderr=0.0, low=-1e-300, high=1 / 3, n=7,
    documents=0, split="heldout/document", dtype="float32", seed=-1, data="ü", config="c", code="transect 0",
)  # fmt: skip
EMPTY = Row(metric="cka", value=None, unit="1", reason="no score tokens")
PLAIN = Row(metric="displacement", value=0.0, unit="1", layer=2)


def table() -> Table:
    return Table([FULL, EMPTY, PLAIN])


def test_value_or_reason_but_not_both_or_neither():
    for value, reason in ((1.0, "why"), (None, None)):
        with pytest.raises(ValueError, match="not both or neither"):
            Row(metric="cka", value=value, unit="1", reason=reason)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", ["value", "stderr", "low", "high"])
def test_what_is_not_finite_is_refused(column: str, wrong: float):
    with pytest.raises(ValueError, match=column):
        Row(**{"metric": "cka", "unit": "1", "value": 1.0, "layer": 3, column: wrong})


def test_rows_do_not_change():
    with pytest.raises(AttributeError):
        FULL.value = 1.0


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", ""])
def test_written_rows_come_back_equal(tmp_path, name: str):
    table().write(tmp_path / "out")
    back = Table.read(tmp_path / "out" / name)
    assert back.rows == table().rows
    assert [type(value) for value in asdict(back.rows[0]).values()] == [type(value) for value in asdict(FULL).values()]


def test_no_partial_file_stays(tmp_path):
    table().write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.parquet"]


def test_empty_table_comes_back(tmp_path):
    Table().write(tmp_path)
    assert len(Table.read(tmp_path / "rows.parquet")) == len(Table.read(tmp_path / "rows.jsonl")) == 0


def test_lines_hold_only_what_is_there_in_column_order():
    assert json.loads(to_line(EMPTY)) == {"metric": "cka", "reason": "no score tokens", "unit": "1"}
    assert list(json.loads(to_line(FULL))) == [name for name in COLUMNS if name != "reason"]


def test_pandas_keeps_missing_values_missing():
    frame = table().to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["value"].isna().tolist() == [False, True, False]
    assert frame["value"][2] == 0 and frame["stderr"].isna().tolist() == [False, True, True]
    assert frame["layer"].tolist() == [0, pd.NA, 2]
    assert frame["layer"].dtype == "Int64" and frame["value"].dtype == "Float64"
    assert int(frame["tokens"][0]) == 2**40 + 1
    assert frame["reason"].isna().tolist() == [True, False, True]


def test_csv_comes_back(tmp_path):
    table().to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        header, full, empty, plain = csv.reader(file)
    assert header == list(COLUMNS)
    found = dict(zip(header, full, strict=True))
    for name, value in asdict(FULL).items():
        assert (None if found[name] == "" else type(value)(found[name])) == value
    assert dict(zip(header, empty, strict=True))["value"] == ""
    assert (plain[header.index("value")], plain[header.index("layer")], plain[header.index("step")]) == ("0.0", "2", "")


def test_where():
    rows = table()
    assert rows.where(metric="cka").rows == [EMPTY]
    assert rows.where(layer=0, element="ffn").rows == [FULL]
    assert rows.where(layer=None).rows == [EMPTY]
    assert rows.where(lambda row: row.value is not None).rows == [FULL, PLAIN]
    assert rows.where(lambda row: row.value is not None, layer=2).rows == [PLAIN]
    assert len(rows.where(metric="absent")) == 0
    with pytest.raises(ValueError, match="'metrics'"):
        rows.where(metrics="cka")


def test_adding_and_stamping():
    both = table() + Table([PLAIN])
    assert both.rows == [FULL, EMPTY, PLAIN, PLAIN]
    stamped = Table([PLAIN]).stamped(run="a", step=5)
    assert [(row.run, row.step, row.value) for row in stamped] == [("a", 5, 0.0)]
    assert PLAIN.run is None


def test_numpy_numbers_are_rows_too(tmp_path):
    Table([Row(metric="cka", value=float(np.float64(0.5)), unit="1", n=int(np.int64(3)))]).write(tmp_path)
    assert Table.read(tmp_path).rows[0].n == 3


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        Table.read(tmp_path)
    for text in (
        '{"metric": "cka"}',
        '{"metric": "cka", "unit": "1", "value": 1, "colour": 3}',
        "not json",
        '{"metric": "cka", "unit": "1"}',
    ):
        (tmp_path / "rows.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match="not a table of rows"):
            Table.read(tmp_path)
