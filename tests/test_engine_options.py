"""Options of the engine that change speed or memory but no number; and the precision that changes numbers."""

import pytest
import torch
import torch.nn.functional as F

from megalite.engine import Engine, build_ds_config
from megalite.errors import ConfigError
from megalite.mesh import build_mesh, single_mesh
from megalite.objectives import CausalLM
from tests.models.plain import plain_logits
from tests.plain_training import initial_weights
from tests.ranks import run_ranks
from tests.runs import tiny_config

LENGTH, STEPS = 16, 4
MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}


def config_of(tensor=1, zero_stage=1, model=None, **engine):
    return tiny_config(
        "unused",
        model=MODEL | (model or {}),
        parallel={"tensor": tensor},
        engine={"precision": "fp32", "zero_stage": zero_stage} | engine,
        data={"train": "unused", "sequence_length": LENGTH},
    )


def losses_of(config) -> list[float]:
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    objective, data = CausalLM(LENGTH), mesh.data
    losses = []
    for step in range(STEPS):
        ids = torch.randint(300, (8, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        parts = ids.split(2)[data.rank :: data.size]
        losses.append(float(engine.train_step([objective.batch(part) for part in parts], step, 1e-2).loss))
    return losses


@pytest.mark.parametrize(
    ("tensor", "zero_stage", "changes"),
    [
        (1, 1, {"offload": "optimizer"}),
        (1, 3, {"offload": "optimizer"}),
        (1, 3, {"offload": "parameters"}),
        (2, 1, {"recompute": "full"}),
        (1, 3, {"recompute": "full"}),
        (1, 3, {"recompute": "selective"}),
    ],
)
def test_offload_and_recomputation_change_no_loss(tensor, zero_stage, changes):
    plain = run_ranks(2, losses_of, config_of(tensor, zero_stage))[0]
    assert run_ranks(2, losses_of, config_of(tensor, zero_stage, **changes))[0] == pytest.approx(plain, abs=1e-6)
    assert plain[-1] != plain[0]


@pytest.mark.parametrize("terms", [{"label_smoothing": 0.2}, {"z_loss": 0.05}])
def test_terms_of_the_objective_are_in_the_training_loss(terms):
    config = tiny_config(
        "unused",
        model=MODEL,
        engine={"precision": "fp32"},
        data={"train": "unused", "sequence_length": LENGTH},
        objective=terms,
    )
    ids = torch.randint(300, (8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    logits = plain_logits(initial_weights(config), config.model, ids[:, :-1])
    smoothing = terms.get("label_smoothing", 0.0)
    wanted = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], label_smoothing=smoothing)
    wanted = wanted + terms.get("z_loss", 0.0) * logits.logsumexp(-1).square().mean()
    assert run_ranks(2, losses_of, config)[0][0] == pytest.approx(wanted.item(), abs=1e-5)


def test_offload_asks_deepspeed_for_the_cpu():
    mesh = single_mesh(torch.device("cpu"))
    zero = build_ds_config(config_of(zero_stage=3, offload="parameters"), mesh, "fp32")["zero_optimization"]
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"


def test_compile_is_handed_to_every_block():
    run_ranks(1, built_with_compile)


def built_with_compile() -> None:
    mesh = build_mesh(config_of().parallel, torch.device("cpu"))
    for compile_blocks in (False, True):
        engine = Engine(config_of(compile=compile_blocks, zero_stage=0), mesh)
        assert all((block._compiled_call_impl is not None) == compile_blocks for block in engine.model.blocks)


def test_gradient_clipping_bounds_the_update():
    free, clipped = (run_ranks(1, losses_of, config_of(zero_stage=0, grad_clip=clip))[0] for clip in (0.0, 1e-9))
    assert free[0] == clipped[0]
    assert free[-1] != clipped[-1]


def fp16_run(config) -> tuple[list[float], list[bool], list[float]]:
    """fp16 on a CPU that DeepSpeed takes for one that can: torch computes it in software."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    objective, data = CausalLM(LENGTH), mesh.data
    losses, applied, scales = [], [], []
    for step in range(10):
        ids = torch.randint(300, (8, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        parts = ids.split(2)[data.rank :: data.size]
        result = engine.train_step([objective.batch(part) for part in parts], step, 1e-3)
        losses.append(float(result.loss))
        applied.append(result.applied)
        scales.append(float(engine.optimizer.loss_scaler.cur_scale))
    return losses, applied, scales


def test_fp16_scales_the_loss_skips_what_overflows_and_goes_on():
    overrides = {"fp16": {"initial_scale_power": 40, "hysteresis": 1}}
    losses, applied, scales = run_ranks(2, fp16_run, config_of(2, 1, precision="fp16", ds_overrides=overrides))[0]
    assert not applied[0], "a scale of 2^40 does not overflow fp16"
    assert scales == sorted(scales, reverse=True)
    assert scales[-1] < scales[0]
    fp32 = run_ranks(2, losses_of, config_of(2, 1))[0]
    assert losses[0] == pytest.approx(fp32[0], abs=2e-3)


def test_what_a_device_cannot_do_is_a_config_error():
    with pytest.raises(RuntimeError, match=r"engine\.precision: found fp16, which this device cannot do"):
        run_ranks(1, fp16_refused)


def test_what_deepspeed_refuses_only_when_it_is_built_is_a_config_error():
    with pytest.raises(RuntimeError, match=r"ConfigError: engine\.ds_overrides: DeepSpeed refuses .*fp8"):
        run_ranks(1, losses_of, config_of(ds_overrides={"data_types": {"grad_accum_dtype": "fp8"}}))


def fp16_refused() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: False
    try:
        Engine(config_of(precision="fp16"), build_mesh(config_of().parallel, torch.device("cpu")))
    except ConfigError as error:
        raise RuntimeError(error) from None


def nan_weight(engine) -> None:
    engine.model.head.norm.weight_offset.data[0] = float("nan")


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_step_with_nan_gradients_is_skipped(zero_stage):
    applied, before, after = run_ranks(2, one_nan_step, config_of(1, zero_stage))[0]
    assert applied == [False, False]
    assert before == after


def one_nan_step(config):
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = Engine(config, mesh)
    engine.init_weights()
    before = engine.model.embedding.tokens.weight.detach().clone()
    if mesh.rank == 1:
        nan_weight(engine)  # on one rank only: all must skip
    ids = torch.randint(300, (8, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    parts = [CausalLM(LENGTH).batch(part) for part in ids.split(2)[mesh.data.rank :: mesh.data.size]]
    applied = [engine.train_step(parts, step, 1e-2).applied for step in range(2)]
    return applied, before.tolist(), engine.model.embedding.tokens.weight.detach().tolist()
