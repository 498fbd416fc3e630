"""One rank of `megalite parity`: losses and gradients of a small model, through the engine and in float64."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.engine_state import get_tensor, link_moments
from megalite.comm import all_reduce
from megalite.config.place import Place
from megalite.config.schema import TrainConfig
from megalite.engine import Engine
from megalite.layers.cross_entropy import LossTerms, Target
from megalite.layers.shard import Init, init_of
from megalite.mesh import Mesh, build_mesh
from megalite.models import build_model, gather_parameter, materialize, named_logical_parameters
from megalite.objectives import Batch, build_objective, documents_of
from megalite.optim import learning_rate
from megalite.process import pick_device, start_process_group

STEPS = 3
RESULT, TENSORS = "result.json", "tensors.safetensors"
_END_OF_DOCUMENT = 0
_NEW_DOCUMENT = 1 / 6  # of the tokens end a document
_ZEROS_STD = 0.05  # of what a model initialises with zeros: biases, norm weights


def measure(config: TrainConfig, place: Place, folder: Path) -> None:
    """Train `STEPS` steps on random tokens and write what came out to `folder`, from rank 0.

    result.json: `losses` and `grad_norms` of the engine's steps in fp32, `loss` of one pass in float64, `names` of the
    parameters in the order of the model. tensors.safetensors, whole, by logical name: gradients of the first step as
    `gradients/<name>` and `float64/<name>`, and what the steps changed of the weights as `updates/<name>`.
    """
    device = pick_device(place)
    start_process_group(place, device)
    try:
        mesh = build_mesh(config.parallel, device)
        loss, gradients = _float64_pass(config, mesh)
        losses, norms, tensors = _engine_steps(config, mesh)
        if mesh.rank == 0:
            tensors |= {f"float64/{name}": tensor for name, tensor in gradients.items()}
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
            result = {"losses": losses, "grad_norms": norms, "loss": loss, "names": list(gradients)}
            (folder / RESULT).write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


def _micro_batches(config: TrainConfig, mesh: Mesh, step: int) -> list[Batch]:
    """This data rank's part of a global batch that is the same for every layout.

    Documents are short, so that boundaries lie everywhere, and each sequence has another share of tokens that do not
    count, so that a mean of means is not the mean.
    """
    trainer, length = config.trainer, config.data.sequence_length
    generator = torch.Generator().manual_seed(config.seed + step)
    shape = (trainer.global_batch_size, length + 1)
    samples = torch.randint(config.model.known_vocab_size, shape, generator=generator)
    samples[torch.rand(shape, generator=generator) < _NEW_DOCUMENT] = _END_OF_DOCUMENT
    counted = torch.rand(shape[0], length, generator=generator) < torch.rand(shape[0], 1, generator=generator) + 0.1
    objective = build_objective(config.objective, config.data, _END_OF_DOCUMENT)
    batches = []
    for rows in torch.arange(shape[0]).split(trainer.micro_batch_size)[mesh.data.rank :: mesh.data.size]:
        batch = objective.batch(samples[rows].to(mesh.device))
        batches.append(dataclasses.replace(batch, mask_BS=batch.mask_BS & counted[rows].to(mesh.device)))
    return batches


def _without_zeros(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Let biases and norm weights begin anywhere: what is zero hides what is done to it."""
    for _, parameter in parameters:
        if init_of(parameter).std == 0.0:
            parameter.init = Init(_ZEROS_STD)  # type: ignore[attr-defined]


def _float64_pass(config: TrainConfig, mesh: Mesh) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of the first batch: layers and collectives without the engine, without rounding."""
    model = build_model(config.model, mesh, config.engine.recompute)
    _without_zeros(named_logical_parameters(model))
    materialize(model, mesh, config.seed, torch.float64)
    batches = _micro_batches(config, mesh, 0)
    num_tokens = all_reduce(torch.stack([batch.mask_BS.sum() for batch in batches]).sum(), mesh.data)
    terms = LossTerms(config.objective.label_smoothing, config.objective.z_loss)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for batch in batches:
        if mesh.context.size > 1:
            batch = batch.part(model.positions(batch.tokens_BS.shape[1] // mesh.context.size, mesh.device))
        target = Target(batch.labels_BS, batch.mask_BS.double(), terms)
        documents = documents_of(batch.documents_BS, config.data)
        loss = model.train()(batch.tokens_BS, target, documents=documents) / num_tokens
        loss.backward()
        total += loss.detach()
    gradients = {}
    for name, parameter in named_logical_parameters(model):
        assert parameter.grad is not None
        gradients[name] = gather_parameter(all_reduce(parameter.grad, mesh.replica), parameter, mesh)
    return all_reduce(total, mesh.replica).item(), gradients


def _engine_steps(config: TrainConfig, mesh: Mesh) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms; whole gradients of the first step, and what all steps changed of the weights.

    Gradients are read from Adam's first moment, which after one step is (1 - beta_1) times the gradient, so that they
    have been through all that the engine does.
    """
    engine = Engine(config, mesh)
    _without_zeros(engine.parameters())
    engine.init_weights()
    before = {name: _whole(engine, parameter, "weight").clone() for name, parameter in engine.parameters()}
    losses, norms = [], []
    tensors: dict[str, Tensor] = {}
    for step in range(STEPS):
        rate = learning_rate(config.schedule, config.optimizer.lr, step, config.trainer.steps)
        result = engine.train_step(_micro_batches(config, mesh, step), step, rate)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        if step == 0:
            link_moments(engine)
            for name, parameter in engine.parameters():
                moment = _whole(engine, parameter, "exp_avg")
                tensors[f"gradients/{name}"] = moment / (1 - config.optimizer.betas[0])
    for name, parameter in engine.parameters():
        tensors[f"updates/{name}"] = _whole(engine, parameter, "weight") - before[name]
    return losses, norms, tensors


def _whole(engine: Engine, parameter: torch.nn.Parameter, kind: str) -> Tensor:
    return gather_parameter(get_tensor(engine, parameter, kind), parameter, engine.mesh)
