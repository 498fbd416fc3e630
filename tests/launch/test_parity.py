"""`megalite parity` on real ranks: layouts agree, planted bugs are named, what cannot run is refused with a reason."""

import os

import pytest
import torch

from megalite import comm, engine
from megalite.config.compose import compose_train
from megalite.errors import ConfigError
from megalite.launch import parity as command
from megalite.launch.parity import compare, expand
from megalite.layers import context
from tests.layers import plants

LLAMA = ["data.train=unused", "model=llama_1b"]


def verdicts(*overrides, base=LLAMA):
    return compare([compose_train([*base, *expanded]) for expanded in expand(overrides)])


def test_values_with_commas_make_layouts():
    found = expand(["parallel.tensor=1,2", "engine=zero1,zero3", "data.train=[a,b]", "seed=3"])
    assert len(found) == 4
    assert found[1] == ["parallel.tensor=1", "engine=zero3", "data.train=[a,b]", "seed=3"]
    assert expand(["engine.ds_overrides={a:1,b:2}"]) == [["engine.ds_overrides={a:1,b:2}"]]


def test_layouts_agree_with_one_process():
    found = verdicts("parallel.tensor=2", "engine.zero_stage=0,2")
    gpt = ["data.train=unused", "model=gpt2_124m"]
    found += verdicts("parallel.context=2", "parallel.context_method=ring", base=gpt)
    names = ["tp2 sp dp2 zero0", "tp2 sp dp2 zero2", "tp1 cp2-ring dp2 zero1"]
    assert [verdict.layout for verdict in found] == names
    for verdict in found:
        assert verdict.passed, verdict


def test_what_the_model_does_not_allow_is_refused_with_a_reason():
    (refused, fits) = verdicts("parallel.tensor=3,1", "launch.nproc_per_node=3")
    assert refused.refused
    assert "must divide model.num_attention_heads=32" in refused.reason
    assert fits.passed
    assert fits.layout == "tp1 dp3 zero1"


def positions_start_over():
    """Every rank of the context axis takes its tokens for the first ones: wrong rotary angles."""
    context.Context.positions = lambda self, length, device: torch.arange(length // self.axis.size, device=device)


def wrong_denominator():
    """The loss is divided by the tokens of this rank instead of those of the whole batch."""
    honest = engine.all_reduce
    engine.all_reduce = lambda x, axis, op="sum": honest(x, axis, op) if x.is_floating_point() else x


def ring_forgets_a_block():
    honest = context._round
    context._round = lambda kv, axis: list(honest(kv, axis))[:1]


def exchange_keeps_its_gradient():
    comm._Exchange.backward = staticmethod(
        lambda ctx, grad: (torch.cat(grad.chunk(ctx.axis.size, ctx.join), ctx.split), None, None, None)
    )


@pytest.mark.parametrize(
    ("layout", "plant"),
    [
        *((["parallel.tensor=2", "parallel.sequence=false"], plant) for plant in plants.PLANTS),
        *((["parallel.tensor=2"], plant) for plant in plants.SEQUENCE_PLANTS),
        (["engine.zero_stage=0"], wrong_denominator),
        (["parallel.context=2"], exchange_keeps_its_gradient),
        (["parallel.context=2"], positions_start_over),
        (["parallel.context=2", "parallel.context_method=ring"], ring_forgets_a_block),
    ],
)
def test_planted_bugs_are_seen_and_a_parameter_is_named(layout, plant, monkeypatch):
    """The plant runs in the forked ranks; it changes nothing for one process alone."""
    honest = command.spawn_ranks

    def spawn_planted(target, world_size):
        def planted(place):
            if world_size > 1:
                plant()
            target(place)

        return honest(planted, world_size)

    monkeypatch.setattr(command, "spawn_ranks", spawn_planted)
    (verdict,) = verdicts(*layout)
    assert not verdict.passed
    assert not verdict.refused
    assert verdict.first or verdict.reason, "no parameter is named"


def test_the_command(capsys):
    assert command.parity(["model=tiny", "parallel.tensor=2", "launch.nproc_per_node=2"]) == 0
    printed = capsys.readouterr().out
    assert "tp2 sp dp1 zero1" in printed
    assert "same" in printed
    with pytest.raises(ConfigError, match="unknown key parallel"):
        command.parity(["parallel.tensors=2"])
    assert command.parity(["model=tiny", "parallel.tensor=3"]) == 1
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize(("gpus", "hidden"), [(1, True), (4, False), (0, False)])
def test_with_fewer_gpus_than_processes_everything_runs_on_the_cpu(monkeypatch, caplog, gpus, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    monkeypatch.setattr(command, "count_gpus", lambda: gpus)
    command._without_gpus(4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "before")
    assert bool(caplog.messages) == hidden
