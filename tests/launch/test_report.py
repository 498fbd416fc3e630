import json
import re
from html.parser import HTMLParser

import pytest

from megalite.config.compose import compose_train
from megalite.config.frozen import save_config
from megalite.errors import ConfigError, DataError
from megalite.guard.goodput import Life
from megalite.launch.report.charts import build_charts
from megalite.launch.report.command import report, write_report
from megalite.metrics.jsonl import JsonlSink

NASTY = "</pre><script>alert(1)</script>"


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    layout = ["parallel.tensor=2", "parallel.context=2", "parallel.context_method=ring", "engine.recompute=full"]
    run = ["data.train=https://me:canary@host/store", "run_name=nasty<b>", "trainer.steps=200", "model.vocab_size=512"]
    config = compose_train([*run, *layout])
    save_config(config, folder / "config.yaml")
    sink = JsonlSink(folder / "metrics.jsonl", 0)
    for step in range(1, 101):
        row = {
            "loss": 8 - 0.05 * step if step != 50 else float("nan"),
            "learning_rate": 1e-4,
            "grad_norm": 1.0 if step != 50 else float("inf"),
            "tokens_seen": 100 * step,
            "tokens_per_second": 1000.0,
            "step_seconds": 0.6,
            "mfu": None,
            "memory_bytes": 2**30,
            "skipped_steps": int(step >= 50),
        }
        if step in (50, 100):
            row |= {"eval/tang/loss": 4.0, "eval/tang/perplexity": 54.6, "eval/tang/bits_per_byte": 2.5 + step / 100}
        sink.log(step, row)
    sink.close()
    (folder / "samples.txt").write_text(f"春風\n{NASTY}\n")
    return folder


def test_the_page_shows_the_run(run_dir):
    content = write_report(run_dir).read_text()
    page = Page(content)
    for text in (
        "nasty<b>",
        "100 of 200 steps, 50% done",
        "3.0000, best 3.0000 at step 100",
        "tensor 2 and sequence, context 2 (ring), ZeRO 1, auto, recompute full",
        "10k",  # tokens
        "1m 00s",  # 100 steps of 0.6 s
        "1k tokens/s (median)",
        "3.0000 at step 50",  # the best evaluation
        "春風",
        NASTY,
        "megalite generate run_dir=",
    ):
        assert text in page.text, text
    titles = ["Loss", "Bits per byte", "Gradient norm", "Learning rate", "Throughput", "Memory"]  # no MFU on a CPU
    assert [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"] == titles


def test_the_page_runs_nothing_loads_nothing_and_tells_no_secret(run_dir):
    content = write_report(run_dir).read_text()
    page = Page(content)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "b"}
    assert "canary" not in content
    assert "https://***@host/store" in content
    references = [
        value for _, attributes in page.tags for key, value in attributes.items() if key.endswith(("href", "src"))
    ]
    assert all(value.startswith("#") for value in references)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {value[1:] for value in references} <= set(identifiers)


def test_the_colours_of_the_curves_follow_the_page(run_dir):
    content = write_report(run_dir).read_text()
    assert "#010203" not in content
    assert "#040506" not in content
    assert content.count("var(--ink)") > 20


def test_the_picture_is_a_png_of_the_stated_size(run_dir):
    write_report(run_dir)
    header = (run_dir / "loss_curve.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1600, 900)


def test_the_same_run_gives_the_same_page(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_the_curves_hold_the_finite_points(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: float(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    loss = build_charts(rows)[0]
    assert [series.label for series in loss.series] == ["training", "tang"]
    assert loss.series[0].points == [(step, 8 - 0.05 * step) for step in range(1, 101) if step != 50]
    assert loss.series[1].points == [(50, 4.0), (100, 4.0)]


def test_a_source_may_have_any_name(run_dir):
    sink = JsonlSink(run_dir / "metrics.jsonl", 100)
    sink.log(101, {"loss": 1.0, "eval/a$b<&$/loss": 3.0, "eval/a$b<&$/bits_per_byte": 1.0})
    sink.close()
    assert "a$b<&$" in Page(write_report(run_dir).read_text()).text


def test_one_row_is_enough_and_none_is_an_error(run_dir):
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert "1 of 200 steps" in write_report(run_dir).read_text()
    metrics.unlink()
    with pytest.raises(DataError, match="holds no figures yet"):
        write_report(run_dir)


def test_the_command(run_dir, tmp_path, capsys):
    assert report([f"run_dir={run_dir}"]) == 0
    assert re.fullmatch(rf"{run_dir}/report.html\n{run_dir}/loss_curve.png\n", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"config\.yaml does not exist"):
        report([f"run_dir={tmp_path / 'nowhere'}"])


def test_where_the_time_went(run_dir):
    lives = [Life(0.0, 100.0, 0, 40, {"start": 20.0, "step": 80.0}), Life(150.0, 250.0, 20, 60, {"step": 100.0})]
    (run_dir / "goodput.jsonl").write_text("".join(json.dumps(vars(life)) + "\n" for life in lives))
    page = write_report(run_dir).read_text()
    assert "4m 10s in 2 starts: start 8.0%, step 56.0%, lost work 16.0%, down 20.0%" in page
