"""Train a tokenizer (`megalite tokenizer train`): the folder that `load_tokenizer` takes."""

import os
from pathlib import Path

from megalite.config.schema_data import TokenizerTrainConfig
from megalite.config.validate_commands import validate_tokenizer_train
from megalite.data.files import OVERWRITE_HINT, disk_errors, new_directory, refuse_existing, write_synced
from megalite.tokenizer import CONFIG, HF_JSON, SP_MODEL, config_text, load_tokenizer

from .library_models import TRAINERS, train_library
from .sample import TrainingSample
from .sentencepiece_models import train_sentencepiece


def train_tokenizer(config: TokenizerTrainConfig) -> Path:
    """Train on `config.input` and write the folder `config.output` (model, configuration); returns its path.

    Raises `ConfigError` for values out of range, and for a vocabulary that the text cannot fill or that cannot hold its
    characters; `DataError` for bad input, and for an output that exists (without `overwrite`).
    """
    validate_tokenizer_train(config)
    output = Path(config.output)
    mark = CONFIG if config.overwrite else None
    refuse_existing(output, mark, OVERWRITE_HINT)
    with disk_errors(output), new_directory(output, mark) as temporary:
        sample = TrainingSample(config)
        if config.tokenizer.type in TRAINERS:
            os.environ.setdefault("RAYON_NUM_THREADS", str(config.tokenizer.num_threads))  # read at first use
            kind = "huggingface"
            write_synced(temporary / HF_JSON, train_library(sample, config.tokenizer) + "\n")
        else:
            kind = "sentencepiece"
            (temporary / SP_MODEL).write_bytes(train_sentencepiece(sample, config.tokenizer))
        tokenizer = load_tokenizer(temporary)
        tokenizer.name = output.name
        settings = {**vars(config.tokenizer), "sampled_bytes": sample.sampled_bytes}
        write_synced(temporary / CONFIG, config_text(kind, tokenizer, training=settings))
    return output
