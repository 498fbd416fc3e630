import logging

import pytest

from megalite.log import get_logger, setup_logging


@pytest.fixture(autouse=True)
def _root_as_before():
    root = logging.getLogger("megalite")
    before = (root.handlers[:], root.propagate, root.level)
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.propagate, root.level = before


def test_rank_0_speaks_and_the_others_only_of_errors(capsys, tmp_path):
    log = get_logger("megalite.data.format")
    setup_logging(0)
    log.info("first")
    setup_logging(3, tmp_path / "rank_3.log")
    log.info("second")
    log.error("third")
    captured = capsys.readouterr()
    assert captured.err == "first\n[rank 3] third\n"
    assert captured.out == "", "standard output belongs to results"
    lines = (tmp_path / "rank_3.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO megalite.data.format: second",
        "ERROR megalite.data.format: third",
    ]


def test_a_disk_that_takes_no_more_is_one_warning_and_loses_nothing(capsys, tmp_path):
    setup_logging(1, tmp_path / "rank_1.log")
    (file,) = (h for h in logging.getLogger("megalite").handlers if isinstance(h, logging.FileHandler))
    real, full = file.stream, open("/dev/full", "w")  # noqa: SIM115
    file.stream = full
    for number in range(3):
        get_logger("megalite.data").info("row %d", number)
    file.stream = real
    get_logger("megalite.data").info("row 3")
    printed = capsys.readouterr().err
    assert printed.splitlines() == [
        f"{tmp_path / 'rank_1.log'} cannot be written: [Errno 28] No space left on device. This is said once."
    ]
    assert "row 3" in (tmp_path / "rank_1.log").read_text()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_names_stand_below_one_root():
    assert get_logger("megalite.train").name == "megalite.train"
    assert get_logger("__main__").name == "megalite.__main__"
