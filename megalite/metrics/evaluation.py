"""Loss, perplexity and bits per byte of whole documents, by source."""

import itertools
import math
from collections.abc import Callable

import torch

from megalite.comm import all_reduce
from megalite.data.format import TokenStore
from megalite.mesh import Mesh
from megalite.objectives import Batch, CausalLM


class EvaluationInterrupted(Exception):  # noqa: N818  no error
    """A run was asked to stop while it evaluated."""


def evaluate_store(
    losses: Callable[[Batch], torch.Tensor],
    objective: CausalLM,
    store: TokenStore,
    source: str,
    mesh: Mesh,
    micro_batch_size: int,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Figures of one store as `eval/<source>/loss` (nats a token), `/perplexity` and `/bits_per_byte`.

    `losses` maps a batch to negative log-likelihoods in nats of the positions that this rank holds, 0 where the mask is
    false. Bits per byte is the summed negative log2-likelihood of the documents' tokens over the UTF-8 bytes of their
    untouched text, comparable across tokenizers. Every data rank takes its share of the windows; all ranks return the
    same figures. Raises `EvaluationInterrupted` on all of them when `is_interrupted`, which answers alike, says so.
    """
    rows = micro_batch_size * mesh.data.size
    windows = objective.evaluation_windows(store)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    num_tokens = 0
    while chunk := list(itertools.islice(windows, rows)):
        num_tokens += sum(len(window) - 1 for window in chunk)
        start = mesh.data.rank * micro_batch_size
        batch = objective.evaluation_batch(chunk[start : start + micro_batch_size], micro_batch_size)
        total += losses(batch).double().sum()
        if is_interrupted():
            raise EvaluationInterrupted
    nats = all_reduce(total, mesh.replica).item()
    loss = nats / max(num_tokens, 1)
    return {
        f"eval/{source}/loss": loss,
        f"eval/{source}/perplexity": math.exp(min(loss, 700.0)),
        f"eval/{source}/bits_per_byte": nats / math.log(2) / max(store.manifest.num_bytes, 1),
    }
