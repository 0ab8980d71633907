"""The report, read back from the tables."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.image import imread

from pipelines import report
from tests.pipelines.conftest import run, write_jsonl


@pytest.fixture(scope="module")
def output(audio, random_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    mixture, dog = str(audio / "room.wav"), str(audio / "dog.wav")
    rows = [
        {"id": "one", "mixture": mixture, "target": dog, "positive_text": "dog", "negative_text": "rain"},
        {"id": "two", "target": dog, "interference": mixture, "positive_text": "bell"},
        {"id": "three", "mixture": str(audio / "street.flac"), "positive_text": "dog"},
        {"id": "four", "mixture": "absent.wav", "positive_text": "dog"},
        {"id": "five", "mixture": "absent.wav", "positive_text": "dog"},
    ]
    assert run(write_jsonl(folder / "m.jsonl", rows), folder / "output", random_bundle) == 0
    return folder / "output"


def test_report_prints_rows_summary_errors_and_draws(output, capsys):
    assert report.main([str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["one", "two", "three"]
    assert "dog - rain" in lines[1]
    assert lines[3].split()[-2] == "-", "no reference, no improvement"
    assert any(line.startswith("SI-SDRi: mean") and "over 2 rows" in line for line in lines)
    assert "2 error rows:" in lines
    assert any("2 x decode/AudioError, e.g. row 4 (four)" in line for line in lines)
    picture = (output / report.PICTURE).read_bytes()
    assert report.main([str(output)]) == 0
    assert (output / report.PICTURE).read_bytes() == picture
    pixels = imread(io.BytesIO(picture))
    assert pixels.shape[0] > 400
    assert pixels.shape[1] == 1500
    assert np.std(pixels[..., :3]) > 0.1


def test_long_tables_are_cut_with_a_note():
    row = {"id": "x" * 50, "duration_s": 1.0, "si_sdri": -1.0, "energy_ratio_db": 0.0}
    row |= {"sdri": None, "snri": None}
    row |= {f"{side}_{kind}": [] for side in ("positive", "negative") for kind in ("text", "audio")}
    lines = report.table_lines([row] * 50)
    assert len(lines) == 1 + report.LINES + 1 + 1
    assert lines[-2] == "... and 10 more rows in the metrics table"
    assert lines[-1] == "SI-SDRi: mean -1.00 dB, median -1.00, below 0 100%, over 50 rows with a target"


def test_rows_to_draw_prefers_rows_with_a_target():
    rows = [{"id": i, "si_sdri": 1.0 if i % 2 else None} for i in range(20)]
    assert [row["id"] for row in report.rows_to_draw(rows)] == [1, 5, 11, 15]
    assert [row["id"] for row in report.rows_to_draw(rows[:1])] == [0]
    assert report.rows_to_draw([]) == []


def test_a_recording_that_is_gone_does_not_stop_the_report(output):
    rows = [{**row, "mixture": "absent.wav"} for row in _rows(output)]
    assert report.draw(rows[:1], str(output)).startswith(b"\x89PNG")


def _rows(output):
    from pipelines.commits import read_committed

    return read_committed(str(output))[0].to_pylist()


def test_no_run_no_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
