"""`megalite tokenizer train`: a vocabulary from text."""

from collections.abc import Sequence

from megalite.config.compose import compose_config
from megalite.config.schema import TokenizerTrainConfig


def train(argv: Sequence[str]) -> int:
    """Train a SentencePiece tokenizer; the output is a folder that `megalite data build` takes.

    Example: megalite tokenizer train input=books/ output=data/tokenizer tokenizer.type=sp_bpe tokenizer.vocab_size=8192

    Keys (conf/tokenizer_train.yaml): input (files, folders or globs), output, split, overwrite, tokenizer.type
    (sp_bpe, sp_unigram), tokenizer.vocab_size, tokenizer.character_coverage, tokenizer.byte_fallback,
    tokenizer.language_balance, tokenizer.sample_bytes, tokenizer.num_threads; reader.* as for `megalite data build`.
    """
    from megalite.data_tools.tokenizer_training import train_tokenizer
    from megalite.tokenizer import load_tokenizer

    path = train_tokenizer(compose_config("tokenizer_train", TokenizerTrainConfig, argv))
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size} entries, digest {tokenizer.digest}")
    return 0
