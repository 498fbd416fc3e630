"""One rank of `megalite parity`: losses and gradients of a small model, through the engine and in float64."""

import json
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
from megalite.mesh import Mesh, build_mesh
from megalite.models import build_model, gather_parameter, materialize, named_logical_parameters
from megalite.objectives import Batch, build_objective, documents_of
from megalite.optim import learning_rate
from megalite.process import pick_device, start_process_group

STEPS = 3
RESULT, GRADIENTS = "result.json", "gradients.safetensors"


def measure(config: TrainConfig, place: Place, folder: Path) -> None:
    """Train `STEPS` steps on random tokens and write what came out to `folder`, from rank 0.

    result.json: `losses` and `grad_norms` of the engine's steps in fp32, `loss` of one pass in float64.
    gradients.safetensors: whole gradients of the first step by logical name, as `engine/<name>` and `float64/<name>`.
    """
    device = pick_device(place)
    start_process_group(place, device)
    try:
        mesh = build_mesh(config.parallel, device)
        loss, gradients = _float64_pass(config, mesh)
        losses, norms, of_engine = _engine_steps(config, mesh)
        if mesh.rank == 0:
            tensors = {f"float64/{name}": tensor for name, tensor in gradients.items()}
            tensors |= {f"engine/{name}": tensor for name, tensor in of_engine.items()}
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / GRADIENTS)
            (folder / RESULT).write_text(json.dumps({"losses": losses, "grad_norms": norms, "loss": loss}))
    finally:
        dist.destroy_process_group()


def _micro_batches(config: TrainConfig, mesh: Mesh, step: int) -> list[Batch]:
    """This data rank's part of a global batch that is the same for every layout."""
    trainer, length = config.trainer, config.data.sequence_length
    generator = torch.Generator().manual_seed(config.seed + step)
    shape = (trainer.global_batch_size, length + 1)
    samples = torch.randint(config.model.known_vocab_size, shape, generator=generator)
    objective = build_objective(config.objective, config.data, end_of_document=0)
    parts = samples.split(trainer.micro_batch_size)[mesh.data.rank :: mesh.data.size]
    return [objective.batch(part.to(mesh.device)) for part in parts]


def _float64_pass(config: TrainConfig, mesh: Mesh) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of the first batch: layers and collectives without the engine, without rounding."""
    model = build_model(config.model, mesh, config.engine.recompute)
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
    """Losses, gradient norms, and the whole gradients of the first step.

    They are read from Adam's first moment, which after one step is (1 - beta_1) times the gradient, so that they have
    been through all that the engine does. Weights are not compared: where a gradient is zero but for rounding, as of a
    key's bias, Adam makes a whole step of the rounding.
    """
    engine = Engine(config, mesh)
    engine.init_weights()
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        rate = learning_rate(config.schedule, config.optimizer.lr, step, config.trainer.steps)
        result = engine.train_step(_micro_batches(config, mesh, step), step, rate)
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
        if step == 0:
            link_moments(engine)
            for name, parameter in engine.parameters():
                moment = gather_parameter(get_tensor(engine, parameter, "exp_avg"), parameter, mesh)
                gradients[name] = moment / (1 - config.optimizer.betas[0])
    return losses, norms, gradients
