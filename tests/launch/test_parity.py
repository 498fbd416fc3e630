"""`megalite parity` on real ranks: layouts agree, planted bugs are named, what cannot run is refused with a reason."""

import dataclasses
import os

import pytest
import torch

from megalite import comm, engine
from megalite.config.compose import compose_train
from megalite.errors import ConfigError
from megalite.launch import parity as command
from megalite.launch.parity import compare, expand
from megalite.layers import context, documents, linear, norm, region
from megalite.models import decoder
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


def mean_of_means():
    """Every replica divides by its own tokens and the number of replicas."""
    honest = engine.all_reduce
    engine.all_reduce = lambda x, axis, op="sum": honest(x, axis, op) if x.is_floating_point() else x * axis.size


def masks_are_ignored():
    documents.Documents.mask = lambda self, rows, seen: seen


def positions_do_not_restart():
    documents.Documents.positions_of = lambda self, positions_S: positions_S


def window_is_ignored():
    honest = decoder.attention_mask
    decoder.attention_mask = lambda past, new, window, device: honest(past, new, None, device)


def bias_of_every_rank():
    def forward(self, x):
        y = torch.nn.functional.linear(x, self.weight)
        return region.sum_partial(y if self.bias is None else y + self.bias, self.axis)

    linear.RowParallelLinear.forward = forward


def changed_optimizer(**changes):
    honest = engine.build_optimizer
    engine.build_optimizer = lambda config, parameters: honest(dataclasses.replace(config, **changes), parameters)


def no_weight_decay():
    changed_optimizer(weight_decay=0.0)


def another_second_moment():
    changed_optimizer(betas=(0.9, 0.5))


def changed_step(change):
    honest = engine.Engine.train_step
    engine.Engine.train_step = lambda self, batches, step, rate: change(self, honest, batches, step, rate)


def smaller_rate():
    changed_step(lambda self, honest, batches, step, rate: honest(self, batches, step, 0.9 * rate))


def weights_stay(self, honest, batches, step, rate):
    before = [parameter.detach().clone() for _, parameter in self.parameters()]
    result = honest(self, batches, step, rate)
    for (_, parameter), value in zip(self.parameters(), before, strict=True):
        if self.mesh.replica.rank:
            parameter.data.copy_(value)
    return result


def another_replica_keeps_its_weights():
    changed_step(weights_stay)


def losses_that_are_no_numbers():
    changed_step(lambda self, honest, *args: dataclasses.replace(honest(self, *args), loss=torch.tensor(torch.nan)))


def norm_of_one_tensor_rank():
    honest = engine.clip_grad_norm
    engine.clip_grad_norm = lambda parameters, clip, axis: honest(parameters, clip, dataclasses.replace(axis, size=1))


def scatter_repeats_its_gradient():
    comm._Scatter.backward = staticmethod(lambda ctx, grad: (torch.cat([grad] * ctx.axis.size, ctx.dim), None, None))


def leave_repeats_its_gradient():
    comm._Leave.backward = staticmethod(lambda ctx, grad: (torch.cat([grad] * ctx.axis.size, ctx.dim), None, None))


def largest_logit_of_one_rank():
    honest = comm.all_reduce
    comm.all_reduce = lambda x, axis, op="sum": x if op == "max" else honest(x, axis, op)


def norms_of_own_heads_are_not_summed():
    honest = norm.RMSNorm.__init__
    norm.RMSNorm.__init__ = lambda self, size, eps, axis, of_own_heads=False: honest(self, size, eps, axis)


TINY = ["data.train=unused", "model=tiny", "parallel.tensor=1"]
RING = ["parallel.context=2", "parallel.context_method=ring", "data.document_attention=true"]
ULYSSES = ["parallel.context=2", "parallel.context_method=ulysses", "data.document_attention=true"]


@pytest.fixture(autouse=True, scope="module")
def one_reference():
    """The process alone runs once for each model: plants are not in it."""
    honest, known = command._run, {}

    def run(config, num_processes):
        key = repr((config, num_processes))
        if num_processes > 1 or key not in known:
            known[key] = honest(config, num_processes)
        return known[key]

    command._run = run
    yield
    command._run = honest


@pytest.mark.parametrize(
    ("layout", "plant"),
    [
        (TINY, mean_of_means),
        (TINY, no_weight_decay),
        pytest.param(TINY, another_second_moment, marks=pytest.mark.slow),
        pytest.param(TINY, smaller_rate, marks=pytest.mark.slow),
        (TINY, another_replica_keeps_its_weights),
        (TINY, losses_that_are_no_numbers),
        ([*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2", "engine.zero_stage=0"], norm_of_one_tensor_rank),
        ([*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2"], bias_of_every_rank),
        (
            [*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2", "model.sliding_window=64"],
            window_is_ignored,
        ),
        pytest.param(
            [*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2"],
            scatter_repeats_its_gradient,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2"],
            leave_repeats_its_gradient,
            marks=pytest.mark.slow,
        ),
        ([*TINY[:2], "parallel.tensor=2", "launch.nproc_per_node=2"], largest_logit_of_one_rank),
        (
            ["model.qk_norm=true", "parallel.tensor=2", "parallel.sequence=false", "launch.nproc_per_node=2"],
            norms_of_own_heads_are_not_summed,
        ),
        (RING, masks_are_ignored),
        pytest.param(ULYSSES, masks_are_ignored, marks=pytest.mark.slow),
        ([*RING[:2], "data.document_positions=true"], positions_do_not_restart),
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
    (verdict,) = verdicts(*layout, base=[] if "model=tiny" in layout else LLAMA)
    assert not verdict.passed
    assert not verdict.refused
    assert verdict.first or verdict.reason, "nothing is named"


def test_what_is_no_number_is_the_worst():
    assert command._worst([1.0, float("nan"), 2.0]) == float("inf")
    assert command._worst([1.0, 3.0, 2.0]) == 3.0
    assert command._relative(1.0, 0.0) == float("inf")
    assert command._relative(0.0, 0.0) == 0.0


@pytest.mark.parametrize("code", [130, 143])
def test_a_parity_that_is_stopped_ends_at_once(monkeypatch, code):
    monkeypatch.setattr(command, "spawn_ranks", lambda target, world_size: code)
    with pytest.raises(SystemExit) as stopped:
        verdicts("parallel.tensor=1,2")
    assert stopped.value.code == code


@pytest.mark.parametrize(
    "override",
    ["objective.label_smoothing=1.5", "optimizer.lr=0", "launch.nproc_per_node=0", "seed=-1", "parallel.tensor=0",
     "engine={zero_stage: 0, precision: bf16}"],
)  # fmt: skip
def test_what_training_refuses_is_refused(override):
    (verdict,) = verdicts(override)
    assert verdict.refused
    assert override.split("=")[0] in verdict.reason


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
