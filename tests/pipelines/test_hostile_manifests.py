"""Manifests and rows that are broken, or made to break something."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clapsep.manifest import MOST_CARRIED, MOST_LEVELS, ManifestError, open_manifest
from pipelines.rows import MOST_ERROR_CHARACTERS, MOST_ID_CHARACTERS, RowError, file_name, parse_row
from tests.pipelines.test_manifest import GOOD, rows_of


def test_bytes_that_are_no_utf8_spoil_their_row_only(tmp_path):
    good = json.dumps(GOOD).encode()
    (tmp_path / "m.jsonl").write_bytes(good + b'\n{"id": "\xff", "mixture": "a"}\n\xff\xfe\n' + good)
    (tmp_path / "m.csv").write_bytes(b"id,mixture,positive_text\na,a.wav,dog\n\xff\xfe,2,dog\n")
    for name, types in (
        ("m.jsonl", [None, "InvalidRow", "UnreadableRecord", None]),
        ("m.csv", [None, "InvalidRow"]),
    ):
        assert open_manifest(str(tmp_path / name)).rows == len(types)
        rows = rows_of(tmp_path / name)
        assert [row.error and row.error.type for row in rows] == types
        assert "UTF-8" in rows[1].error.message
        f"{rows[1].id}{rows[1].error.value}".encode()


def test_a_csv_line_with_a_stray_quote_is_a_row_of_its_own(tmp_path):
    (tmp_path / "m.csv").write_text('id,mixture,positive_text\n"a"b,a.wav,dog\nc,c.wav,dog\n')
    assert open_manifest(str(tmp_path / "m.csv")).rows == 2
    first, second = rows_of(tmp_path / "m.csv")
    assert (first.error.type, second.id) == ("UnreadableRecord", "c")
    assert first.error.value.startswith('"a"b,a.wav,dog')


def test_a_json_key_that_occurs_twice_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_text(f'{json.dumps(GOOD)}\n{{"id": "b", "mixture": "x", "id": "c"}}\n')
    error = rows_of(tmp_path / "m.jsonl")[1].error
    assert "'id' occurs twice" in error.message


@pytest.mark.parametrize("levels", [MOST_LEVELS + 1, 400, 100_000])
def test_deep_json_gives_the_same_row_however_deep_its_reader_is_called(tmp_path, levels):
    line = '{"id": "deep", "site": ' + "[" * levels + "]" * levels + "}"
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")

    def called_deep(frames):
        return rows_of(tmp_path / "m.jsonl") if frames == 0 else called_deep(frames - 1)

    rows = called_deep(0)
    assert "nested deeper" in rows[1].error.message
    assert rows == called_deep(300)


def test_a_column_name_that_no_file_can_hold_is_not_carried(tmp_path):
    lines = [{**GOOD, "site": "roof"}, {**GOOD, "\ud800": "x"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert open_manifest(str(tmp_path / "m.jsonl")).carried == ("site",)
    assert [row.error is None for row in rows_of(tmp_path / "m.jsonl")] == [True, False]


def test_a_column_per_row_is_refused(tmp_path):
    lines = ({**GOOD, f"column {number}": 1} for number in range(MOST_CARRIED + 1))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ManifestError, match="more than 1000 columns"):
        open_manifest(str(tmp_path / "m.jsonl"))


def test_parquet_values_out_of_range_spoil_their_row_only(tmp_path):
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).cast(pa.date32())
    table = pa.table({"id": ["a", "b", "c"], "mixture": ["x"] * 3, "positive_text": ["dog"] * 3, "day": days})
    pq.write_table(table, tmp_path / "m.parquet")
    rows = rows_of(tmp_path / "m.parquet")
    assert [row.error and row.error.type for row in rows] == [None, "UnreadableRecord", None]
    assert rows[2].number == 3


def test_parquet_that_cannot_be_decoded_is_refused(tmp_path):
    texts = [f"{number * 7919:x}" for number in range(2000)]
    pq.write_table(pa.table({"id": texts, "mixture": texts}), tmp_path / "m.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "m.parquet").read_bytes())
    content[100:2000] = bytes(1900)
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(ManifestError, match="cannot be parsed as parquet"):
        open_manifest(str(tmp_path / "m.parquet"))


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column, column], ["id", "id"]), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="repeats id"):
        open_manifest(str(tmp_path / "m.parquet"))


def test_a_pipe_in_a_folder_of_manifests_is_refused_instead_of_waited_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(ManifestError, match="not a file"):
        open_manifest(str(tmp_path))


def test_error_rows_are_short_lines_of_printable_characters():
    text = "\x1b[2J\n\u202e\0\ud800" + "x" * 10_000_000 + "the cause"
    error = RowError("decode", "AudioError", text, text)
    for value in (error.message, error.value):
        assert len(value) < MOST_ERROR_CHARACTERS + 100
        assert value.isprintable()
        assert value.startswith("\\x1b[2J\\n\\u202e\\x00\\ud800xxx")
        assert value.endswith("the cause")
    assert RowError("decode", "AudioError", "größer 🐦").message == "größer 🐦"


def test_an_endless_id_is_refused():
    assert parse_row(GOOD | {"id": "i" * MOST_ID_CHARACTERS}, manifest="m", number=1).error is None
    row = parse_row(GOOD | {"id": "i" * 10_000_000}, manifest="m", number=1)
    assert "longer than 4096 characters" in row.error.message
    assert len(row.id) < 5000


def test_file_names_differ_on_stores_that_ignore_case():
    names = [
        file_name(identifier) for identifier in ("dog", "Dog", "DOG", "dO\u0301g", "d\u00d3g", "D\u00d3g")
    ]
    assert len({name.casefold() for name in names}) == len(names)
    assert names[0] == "dog"


@pytest.mark.parametrize("identifier", ["con", "NUL", "com1.tar", "../aux.x", "LpT9.", "prn"])
def test_windows_devices_are_no_file_names(identifier):
    assert file_name(identifier).partition(".")[0].lower() not in ("con", "nul", "com1", "aux", "lpt9", "prn")
