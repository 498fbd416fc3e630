"""A small model with every switch of a large one, for checks that must run on a laptop."""

import dataclasses
import math

from megalite.config.schema import ModelConfig, TrainConfig

NUM_LAYERS, WIDTH, VOCAB_SIZE, HEAD_SIZE, LENGTH = 2, 128, 500, 8, 32  # 500: not a multiple, so that rows are padded
MICRO_BATCHES = 2
# Adam divides by sqrt(v) + eps: with an eps far above all gradients it steps as SGD of rate lr / eps does. With a small
# one it makes a full step of what is rounding, as of a key's bias, whose gradient is zero.
RATE, EPS = 0.03, 0.1


def shrink(config: TrainConfig, heads_split: int, length_split: int, data_split: int) -> TrainConfig:
    """`config` with at most 2 layers, width 128, vocabulary 500, dropout 0, fp32, a constant rate, no clipping.

    Kept: every architectural switch, the ratios of query to key heads and of MLP to model width, the layout, the
    optimizer but for its rate and eps, and the loss. Key heads divide by `heads_split`, the sequence by `length_split`,
    the global batch by `data_split` with some accumulation: all that the layouts to be compared need.
    """
    batch = MICRO_BATCHES * data_split
    length = length_split * math.ceil(LENGTH / length_split)
    return dataclasses.replace(
        config,
        model=_shrunk_model(config.model, heads_split, length),
        trainer=dataclasses.replace(
            config.trainer, steps=100, stop_after=None, global_batch_size=batch, micro_batch_size=1, eval_every=0
        ),
        # Clipped, gradients of a wrong scale would look right.
        engine=dataclasses.replace(config.engine, precision="fp32", grad_clip=0.0),
        optimizer=dataclasses.replace(config.optimizer, lr=RATE, eps=EPS),
        schedule=dataclasses.replace(config.schedule, name="constant", warmup_steps=0),
        data=dataclasses.replace(config.data, sequence_length=length, validation=()),
    )


def _shrunk_model(model: ModelConfig, split: int, length: int) -> ModelConfig:
    width = min(model.hidden_size, WIDTH)
    shared = model.num_attention_heads // model.num_kv_heads  # query heads to a key head
    kv_heads = math.lcm(split, 2) if model.num_kv_heads > 1 else 1
    ffn = math.ceil(model.ffn_size / model.hidden_size * width / split) * split
    return dataclasses.replace(
        model,
        num_layers=min(model.num_layers, NUM_LAYERS),
        hidden_size=width,
        num_attention_heads=shared * kv_heads,
        num_key_value_heads=kv_heads,
        head_size=min(model.head_dim, HEAD_SIZE),
        ffn_hidden_size=ffn,
        vocab_size=min(model.vocab_size or VOCAB_SIZE, VOCAB_SIZE),
        max_sequence_length=length,
        # Shorter than the sequence, or it would not slide.
        sliding_window=model.sliding_window and min(model.sliding_window, length // 4),
        dropout=0.0,
    )
