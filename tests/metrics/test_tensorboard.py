import pytest

from megalite.config.schema import LoggingConfig
from megalite.metrics.sinks import build_sinks
from megalite.metrics.tensorboard import TensorboardSink


def scalars(folder, panel):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(panel)]


def test_every_row_is_there_under_the_panel_names_and_resume_leaves_no_double(tmp_path):
    for resume_step, stop in ((0, 8), (5, 12)):
        sinks = build_sinks(LoggingConfig(tensorboard=True), tmp_path, "run", resume_step, {})
        for step in range(resume_step + 1, stop + 1):
            for sink in sinks:
                sink.log(step, {"loss": 0.5 * step, "mfu": None, "eval/tang/bits_per_byte": 0.25 * step})
        for sink in sinks:
            sink.close()
    expected = [(step, 0.5 * step) for step in range(1, 13)]
    assert scalars(tmp_path / "tensorboard", "train/loss") == expected
    assert scalars(tmp_path / "tensorboard", "eval/tang/bits_per_byte") == [(s, v / 2) for s, v in expected]


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    sink = TensorboardSink(tmp_path, 0)
    sink.log(1, {"loss": 2.0})
    assert scalars(tmp_path, "train/loss") == [(1, pytest.approx(2.0))]
    sink.close()
