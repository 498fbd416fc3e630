import json
import math
import os

import pytest

from megalite.metrics.jsonl import JsonlSink, read_metrics


def write(path, steps, resume_step=0):
    sink = JsonlSink(path, resume_step)
    for step in steps:
        sink.log(step, {"loss": 1 / step, "mfu": None})
    sink.close()


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


def test_floats_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16 + 2, 12345678901234567]
    sink = JsonlSink(path, 0)
    for step, value in enumerate(values, start=1):
        sink.log(step, {"loss": value, "mfu": None})
    sink.close()
    for row, value in zip(read_metrics(path), values, strict=True):
        assert float(row["loss"]).hex() == float(value).hex()
        assert row["mfu"] is None
    assert type(read_metrics(path)[-1]["loss"]) is int


def test_nan_and_infinity_keep_the_file_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.log(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": -math.inf})
    sink.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["learning_rate"]) == (math.inf, -math.inf)


def test_rows_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.log(1, {"loss": 1.0})
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
    sink.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 31))
    write(path, range(21, 41), resume_step=20)
    assert steps_of(path) == list(range(1, 41))
    assert len(path.read_text().splitlines()) == 40


def test_a_new_run_drops_the_rows_of_an_older_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 31))
    write(path, [1, 2], resume_step=0)
    assert steps_of(path) == [1, 2]


@pytest.mark.parametrize("loss", ["[1]", '"x"', "{}"])
def test_a_figure_that_is_no_number_makes_no_row(tmp_path, caplog, loss):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": 1.5, "mfu": null}}\n')
    assert read_metrics(path) == [{"step": 2, "loss": 1.5, "mfu": None}]
    assert "line 1 is torn" in caplog.text
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path, caplog, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    path.write_bytes(path.read_bytes()[:-cut])
    if cut == 1:  # only the line's end is missing: the row is whole
        assert steps_of(path) == list(range(1, 11))
        return
    assert steps_of(path) == list(range(1, 10))
    assert "line 10 is torn" in caplog.text
    write(path, [10, 11], resume_step=9)
    assert steps_of(path) == list(range(1, 12))


def test_a_second_row_of_a_step_merges_into_the_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    sink = JsonlSink(path, 10)
    sink.log(10, {"eval/tang/loss": 3.0})
    sink.log(10, {"eval/tang/loss": 2.5})
    sink.log(11, {"loss": 0.5})
    sink.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 12))
    assert rows[9] == {"step": 10, "loss": 0.1, "mfu": None, "eval/tang/loss": 2.5}
    assert len(path.read_text().splitlines()) == 11


def test_steps_never_fall(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.log(2, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 1 comes after step 2"):
        sink.log(1, {"loss": 1.0})
    sink.close()


def test_a_row_half_written_on_a_full_disk_is_replaced_by_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.log(1, {"loss": 1.0})
    real = sink._file

    class FullDisk:
        def seek(self, position):
            real.seek(position)

        def write(self, line):
            real.write(line[:7])
            raise OSError(28, os.strerror(28))

    sink._file = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        sink.log(2, {"loss": 2.0})
    sink._file = real
    sink.log(3, {"loss": 3.0})
    sink.close()
    assert steps_of(path) == [1, 3]
    assert len(path.read_text().splitlines()) == 2
