"""`megalite tokenizer train`: a vocabulary from text."""

from collections.abc import Sequence

from megalite.config.compose import compose_config
from megalite.config.schema_data import TokenizerTrainConfig


def train(argv: Sequence[str]) -> int:
    """Train a SentencePiece tokenizer; the output is a folder that `megalite data build` takes."""
    from megalite.data_tools.tokenizer_training import train_tokenizer
    from megalite.tokenizer import load_tokenizer

    path = train_tokenizer(compose_config("tokenizer_train", TokenizerTrainConfig, argv))
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size} entries, digest {tokenizer.digest}")
    return 0
