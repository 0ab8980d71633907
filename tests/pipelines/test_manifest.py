"""Manifests of every form give the same rows, and a bad row stays a row."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clapsep import manifest as manifests
from clapsep.fields import COLUMNS, UnreadableRecord
from clapsep.manifest import ManifestError, open_manifest, read_slice
from pipelines.rows import file_name, parse_row

RECORDS = [
    {"id": "a", "mixture": "x/a.wav", "positive_text": "dog", "site": "roof, north", "start": "1.5"},
    {"id": "b", "mixture": "gs://bucket/b.wav", "positive_text": "cat", "site": "cellar", "start": ""},
]


def rows_of(uri, **texts):
    return [
        parse_row(record, manifest=part.uri, number=number, **texts)
        for part in open_manifest(str(uri)).slices
        for number, record in read_slice(part)
    ]


def write_csv(path, records):
    lines = [",".join(records[0])] + [",".join(f'"{value}"' for value in r.values()) for r in records]
    text = "\ufeff" + "\r\n".join(lines) + "\r\n\r\n"
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode())


def write_jsonl(path, records):
    text = "\n".join(json.dumps(record) for record in records) + "\n\n"
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode())


def write_parquet(path, records):
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("m.csv", write_csv),
        ("m.csv.gz", write_csv),
        ("m.jsonl", write_jsonl),
        ("m.ndjson.gz", write_jsonl),
        ("m.parquet", write_parquet),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    path = tmp_path / name
    write(path, RECORDS)
    manifest = open_manifest(str(path))
    assert (manifest.rows, manifest.carried) == (2, ("site",))
    assert len(manifest.slices) == (2 if name == "m.parquet" else 1)
    first, second = rows_of(path)
    assert (first.id, first.number, first.start, first.error) == ("a", 1, 1.5, None)
    assert first.mixture == f"{tmp_path}/x/a.wav"
    assert first.carried == (("site", "roof, north"),)
    assert (second.mixture, second.number, second.start) == ("gs://bucket/b.wav", 2, None)


def test_folder_and_glob_of_manifests_and_digest(tmp_path):
    for part in range(3):
        write_csv(tmp_path / f"part-{part}.csv", [{**RECORDS[0], "id": str(part)}])
    (tmp_path / "README").write_text("not a manifest")
    whole = open_manifest(str(tmp_path))
    assert (whole.rows, len(whole.slices), whole.ignored) == (3, 3, 1)
    assert open_manifest(str(tmp_path / "part-*.csv")).digest == whole.digest
    write_csv(tmp_path / "part-2.csv", RECORDS[:1])
    assert open_manifest(str(tmp_path)).digest != whole.digest


def test_audio_files_are_a_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "AUDIO_SLICE", 2)
    for name in ("b/two.WAV", "b/one.flac", "zero.ogg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    manifest = open_manifest(str(tmp_path))
    assert (manifest.rows, len(manifest.slices), manifest.ignored) == (3, 2, 1)
    rows = rows_of(tmp_path, positive=("dog",), negative=("rain",))
    assert [(row.number, row.id) for row in rows] == [(1, "b/one.flac"), (2, "b/two.WAV"), (3, "zero.ogg")]
    assert rows[0].mixture == str(tmp_path / "b" / "one.flac")
    assert (rows[0].positive_text, rows[0].negative_text) == (("dog",), ("rain",))
    assert [row.id for row in rows_of(tmp_path / "b" / "*", positive=("dog",))] == ["one.flac", "two.WAV"]
    assert [row.id for row in rows_of(tmp_path / "zero.ogg", positive=("dog",))] == ["zero.ogg"]
    assert open_manifest(str(tmp_path / "*")).rows == 2, "a glob takes every file it matches"


def test_a_row_is_the_same_however_its_manifest_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    write_csv(tmp_path / "d" / "m.csv", RECORDS)
    names = ["d/m.csv", "d/../d/m.csv", str(tmp_path / "d/m.csv"), "d", "d/*.csv", f"{tmp_path}/d/"]
    assert len({tuple((row.key, row.id, row.recording) for row in rows_of(name)) for name in names}) == 1


def test_relative_manifest_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "m.csv", RECORDS)
    assert rows_of("m.csv")[0].mixture == os.path.join(".", "x/a.wav")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"", "empty"),
        ("m.csv", b"id,mixture\n", "holds no rows"),
        ("m.csv", b"a;b\n1;2\n", "none of the columns"),
        ("m.csv", b"id,id\n1,2\n", "repeats id"),
        ("m.csv", b"id,,mixture\n1,2,3\n", "empty name"),
        ("m.csv", b'id,mixture\n1,"never closed\n', "cannot be parsed as csv"),
        ("m.csv", b"id,mixture,Stra\xdfe\n1,2,3\n", "UTF-8"),
        ("m.csv", "id,mixture\n1,2\n".encode("utf-16"), "UTF-8"),
        ("m.csv.gz", b"id,mixture\n1,2\n", "cannot be parsed as csv"),
        ("m.jsonl", b"PK\x03\x04\n", "no line of it is a JSON object"),
        ("m.jsonl", b"", "holds no rows"),
        ("m.parquet", b"PAR1", "cannot be parsed as parquet"),
        ("m.txt", b"id,mixture\n1,2\n", "must end in"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message) as caught:
        open_manifest(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_nothing_there(tmp_path):
    for uri in (tmp_path / "absent.csv", tmp_path / "*.csv", tmp_path):
        with pytest.raises(ManifestError, match="no such file"):
            open_manifest(str(uri))
    (tmp_path / "a.wav").write_bytes(b"")
    write_csv(tmp_path / "m.csv", RECORDS)
    with pytest.raises(ManifestError, match="name one kind by a glob"):
        open_manifest(str(tmp_path))


def test_lines_that_are_no_records_become_error_rows(tmp_path):
    (tmp_path / "m.csv").write_text(
        "id,mixture,positive_text\na,a.wav,dog\nb,b.wav\nc,c.wav,dog,4\nd,d.wav,cat\n"
    )
    assert open_manifest(str(tmp_path / "m.csv")).rows == 4
    rows = rows_of(tmp_path / "m.csv")
    assert [row.error and row.error.type for row in rows] == [None, *["UnreadableRecord"] * 2, None]
    assert "has 2 fields, the header 3" in rows[1].error.message
    (tmp_path / "m.jsonl").write_text('{"id": "a", "mixture": "a", "positive_text": "b"}\n{"id": 1\n[1]\n')
    rows = rows_of(tmp_path / "m.jsonl")
    assert [row.error is None for row in rows] == [True, False, False]
    assert rows[1].error.value == '{"id": 1'
    assert "not JSON" in rows[1].error.message
    assert len({row.key for row in rows}) == 3


GOOD = {"id": "a", "mixture": "a.wav", "positive_text": "dog"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixture": None}, "neither mixture nor target"),
        ({"mixture": "", "target": "t.wav"}, "target without interference"),
        ({"positive_text": ""}, "has no query"),
        ({"positive_text": "  "}, "empty text"),
        ({"positive_text": ["dog", ""]}, "empty text"),
        ({"positive_text": 3}, "text or a list of texts"),
        ({"negative_audio": [1]}, "text or a list of texts"),
        ({"mixture": ["a.wav"]}, "URI or a path, not list"),
        ({"id": True}, "must be text, not bool"),
        ({"id": 1.5}, "must be text, not float"),
        ({"start": "soon"}, "start: is not a number"),
        ({"start": -1}, "at least 0"),
        ({"duration": 0}, "above 0"),
        ({"duration": "nan"}, "finite"),
        ({"snr_db": float("inf")}, "finite"),
        ({"snr_db": False}, "is not a number"),
        ({"note": "\ud800"}, "is not Unicode text"),
        ({"\udcff": "x"}, "is not Unicode text"),
    ],
)
def test_an_invalid_field_is_named(change, message):
    row = parse_row(GOOD | change, manifest="m.jsonl", number=7)
    assert row.error.stage == "manifest"
    assert row.number == 7
    assert row.id
    assert message in row.error.message
    json.dumps([row.id, row.error.message, row.error.value]).encode()
    f"{row.id}{row.error.message}{row.error.value}".encode()


def test_what_a_row_may_leave_out():
    row = parse_row(
        {"target": "t.wav", "interference": "i.wav", "negative_audio": "q.wav"}, manifest="d/m", number=1
    )
    assert row.error is None
    assert row.snr_db is None
    assert (row.target, row.interference, row.negative_audio) == ("d/t.wav", "d/i.wav", ("d/q.wav",))
    same = parse_row(
        {"interference": "i.wav", "negative_audio": "q.wav", "target": "t.wav", "id": ""},
        manifest="e/m",
        number=9,
    )
    assert same.id == row.id, "a digest of the columns, wherever the manifest lies"
    assert parse_row(GOOD | {"id": 7}, manifest="m", number=1).id == "7"


def test_default_query_fills_only_rows_without_one():
    texts = {"positive": ("dog",), "negative": ("rain",)}
    bare = parse_row({"mixture": "a.wav"}, manifest="m", number=1, **texts)
    own = parse_row({"mixture": "a.wav", "negative_text": "wind"}, manifest="m", number=1, **texts)
    assert (bare.positive_text, bare.negative_text) == (("dog",), ("rain",))
    assert (own.positive_text, own.negative_text) == ((), ("wind",))


def test_rows_of_one_segment_share_a_recording():
    def recording(**columns):
        return parse_row(GOOD | columns, manifest="m", number=1).recording

    assert recording() == recording(id="b", positive_text="cat", target="t.wav")
    assert recording() == recording(start="", duration=None)
    assert recording(start=1) == recording(start="1.0")
    assert len({recording(), recording(start=1), recording(duration=1), recording(mixture="b.wav")}) == 4


def test_key_follows_contents_and_place():
    def key(number=1, **columns):
        return parse_row(GOOD | columns, manifest="folder/m.csv", number=number).key

    assert key() == parse_row(GOOD, manifest="elsewhere/m.csv", number=1).key
    assert len({key(), key(2), key(site="roof")}) == 3


@given(st.lists(st.text(max_size=200), min_size=2, max_size=2, unique=True))
def test_file_names_never_collide_nor_escape(ids):
    names = [file_name(identifier) for identifier in ids]
    assert names[0] != names[1]
    # A name that was given to another id must not be claimed by an id of that form.
    assert file_name(names[0]) == names[0] if names[0] == ids[0] else file_name(names[0]) != names[0]
    for name in names:
        assert name
        assert len(name) <= 100
        assert not name.startswith((".", "-"))
        assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@pytest.mark.parametrize("identifier", ["dog-1", "a.b_c", "0"])
def test_plain_ids_are_their_own_file_names(identifier):
    assert file_name(identifier) == identifier


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(COLUMNS) | st.text(), json_values, max_size=8))
def test_any_record_becomes_one_row(record):
    row = parse_row(record, manifest="m.jsonl", number=1)
    again = parse_row(json.loads(json.dumps(record)), manifest="m.jsonl", number=1)
    assert row.key == again.key
    assert row.id == again.id
    assert (row.error is None) == bool(
        (row.mixture or (row.target and row.interference))
        and (row.positive_text or row.negative_text or row.positive_audio or row.negative_audio)
    )


def test_unreadable_record_keeps_its_text():
    row = parse_row(UnreadableRecord("is bad", "a,\ud800"), manifest="m.csv", number=3)
    assert row.error.value == "a,\\ud800"
    assert row.id == ""
