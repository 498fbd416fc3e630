"""Sample text from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megalite.config.schema import DataConfig, GenerateConfig
from megalite.errors import CheckpointError, ConfigError
from megalite.layers.documents import document_ids
from megalite.log import get_logger
from megalite.models import Decoder
from megalite.objectives import documents_of
from megalite.runs import load_run
from megalite.tokenizer import load_tokenizer

log = get_logger(__name__)


def generate(config: GenerateConfig) -> Iterator[str]:
    """Yield `config.num_samples` texts, each the prompt and its continuation up to the end of the document.

    The prompt begins a document: it comes after an end-of-document token, or after what the tokenizer begins texts
    with. A text ends where the model's positions do, which is logged. Raises `ConfigError` when the prompt alone does
    not fit, `CheckpointError` when the model's figures are no numbers.
    """
    run = load_run(config.run_dir, config.checkpoint)
    tokenizer = load_tokenizer(Path(config.run_dir) / "tokenizer")
    end = tokenizer.end_of_document
    prompt = [tokenizer.begin_of_document, *tokenizer.encode(config.prompt)]
    longest = run.config.model.max_sequence_length
    if len(prompt) >= longest:
        raise ConfigError(f"prompt: found {len(prompt)} tokens, must be below model.max_sequence_length={longest}")
    if len(prompt) + config.max_new_tokens > longest:
        log.warning(
            "max_new_tokens: found %d, but after a prompt of %d tokens the model has positions for %d: texts end there",
            config.max_new_tokens,
            len(prompt),
            longest - len(prompt),
        )
    for number in range(config.num_samples):
        generator = torch.Generator(run.mesh.device).manual_seed(config.seed + number)
        tokens = prompt + list(sample_tokens(run.model, prompt, end, longest, config, generator, run.config.data))
        yield tokenizer.decode(tokens[1:])


@torch.no_grad()
def sample_tokens(
    model: Decoder,
    prompt: list[int],
    end: int,
    longest: int,
    config: GenerateConfig,
    generator: torch.Generator,
    data: DataConfig,
) -> Iterator[int]:
    """Yield tokens after `prompt` until `end`, `config.max_new_tokens`, or `longest` tokens in all.

    `data` tells whether the model was trained to keep documents apart.
    """
    device = next(model.parameters()).device
    cache = model.new_cache(1, min(longest, len(prompt) + config.max_new_tokens))
    so_far, tokens_BS = list(prompt), torch.tensor([prompt], device=device)
    for _ in range(min(config.max_new_tokens, longest - len(prompt))):
        ids_BT = document_ids(torch.tensor([so_far], device=device), end) if data.needs_documents else None
        logits_V = model(tokens_BS, cache=cache, documents=documents_of(ids_BT, data))[0, -1]
        token = pick_token(logits_V, config, generator)
        if token == end:
            return
        yield token
        so_far.append(token)
        tokens_BS = torch.tensor([[token]], device=device)


def pick_token(logits_V: torch.Tensor, config: GenerateConfig, generator: torch.Generator) -> int:
    """One token id from logits: the likeliest at temperature 0, else sampled.

    `top_k` (Fan et al. 2018) keeps the k likeliest tokens; `top_p` (nucleus sampling, Holtzman et al. 2020) the
    smallest set of likeliest tokens whose probability reaches p, at least one.
    """
    if not torch.isfinite(logits_V).all():
        raise CheckpointError("the model gives inf or nan: its training diverged; take an earlier checkpoint=PATH")
    if config.temperature == 0:
        return int(logits_V.argmax())
    logits_V = (logits_V.float() - logits_V.max()) / config.temperature  # at most 0: no temperature overflows
    if config.top_k is not None and config.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(config.top_k).values[-1], float("-inf"))
    probabilities_V = logits_V.softmax(-1)
    if config.top_p is not None:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        probabilities_V[order_V[before_V >= config.top_p]] = 0.0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
