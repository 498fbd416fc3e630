"""A layout never changes numbers: a pairwise cover of all layouts, or with `make test-full` all of them."""

import functools

import pytest
import torch

from megalite.config.validate import validate_train
from megalite.errors import ConfigError
from megalite.objectives import build_objective
from megalite.optim import learning_rate
from tests.layouts import GLOBAL_BATCH, LENGTH, STEPS, WORLD, Layout, all_layouts, pairwise_cover
from tests.plain_training import Curve, plain_curve
from tests.ranks import run_ranks
from tests.test_engine import text, worst

ALL, COVER = all_layouts(), pairwise_cover()
END = 32  # a space: every word is a document


def samples(step: int) -> torch.Tensor:
    """The global batch of a step, [GLOBAL_BATCH, LENGTH + 1]."""
    starts = torch.arange(GLOBAL_BATCH) * 30_000 + step * LENGTH
    return text()[starts[:, None] + torch.arange(LENGTH + 1)]


def rate(config, step):
    return learning_rate(config.schedule, config.optimizer.lr, step, config.trainer.steps)


@functools.cache
def reference(family: str, documents: bool) -> Curve:
    config = Layout(family, 1, False, (1, "auto"), 0, 1, "none", documents).config
    rates = [rate(config, step) for step in range(STEPS)]
    curve = plain_curve(config, map(samples, range(STEPS)), rates, END if documents else None)
    assert curve[-1][0] < curve[0][0] - 0.1, "the reference does not learn, so it would not notice much"
    return curve


def prepare(layout: Layout):
    """An engine on this rank, and a function from a step to its micro batches."""
    from megalite.engine import Engine
    from megalite.mesh import build_mesh

    config = layout.config
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    objective = build_objective(config.objective, config.data, END)

    def batches(step: int):
        parts = samples(step).split(config.trainer.micro_batch_size)[mesh.data.rank :: mesh.data.size]
        return [objective.batch(part) for part in parts]

    return engine, batches


def curve_of(layout: Layout) -> Curve:
    """Losses and norms of the engine; runs on every rank."""
    engine, batches = prepare(layout)
    curve = []
    for step in range(STEPS):
        result = engine.train_step(batches(step), step, rate(layout.config, step))
        curve.append((float(result.loss), float(result.grad_norm)))
    return curve


def check(layout: Layout) -> None:
    try:
        validate_train(layout.config, WORLD)
    except ConfigError:
        assert layout.data == 0, "refused, though it should run"
        return
    assert layout.data, "accepted, though it needs more processes than there are"
    for curve in run_ranks(WORLD, curve_of, layout):
        loss, norm = worst(curve, reference(layout.family, layout.documents))
        assert loss <= 1e-5
        assert norm <= 1e-4


@pytest.mark.parametrize("layout", COVER, ids=str)
def test_any_two_choices_together_change_nothing(layout):
    check(layout)


def test_layouts_that_do_not_fit_are_refused_with_a_reason():
    refused = [layout for layout in ALL if not layout.data]
    assert len(refused) == len(ALL) * 2 // 9  # tensor 4 with either kind of context 2
    for layout in refused:
        with pytest.raises(ConfigError, match=r"parallel\.context: found 2, must divide"):
            validate_train(layout.config, WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in ALL if layout.data and layout not in COVER], ids=str)
def test_every_layout_changes_nothing(layout):
    check(layout)
