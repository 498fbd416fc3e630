import logging

import pytest


@pytest.fixture(autouse=True)
def plain_logger():
    """The package's logger as pytest's caplog needs it, whatever a test before or inside has set up."""
    logger = logging.getLogger("megalite")
    kept = logger.handlers[:], logger.propagate, logger.level
    logger.handlers[:], logger.propagate = [], True
    yield
    logger.handlers[:], logger.propagate = kept[0], kept[1]
    logger.setLevel(kept[2])
