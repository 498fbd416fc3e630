"""Tokenizers of the `tokenizers` library: byte-level pair encoding and unigram, and WordPiece.

The byte-level ones spell every text, as GPT-2's does; WordPiece (BERT's) has an unknown token and loses white space.
Pair encoding gives the same file for the same text. The library's trainers of the other two do not (tokenizers 0.23:
they walk over unordered maps).
"""

from typing import Any

from megalite.config.schema_data import TokenizerConfig
from megalite.errors import ConfigError

from .sample import TrainingSample

END = "<|endoftext|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_library(sample: TrainingSample, config: TokenizerConfig) -> str:
    """The text of a tokenizer.json. Raises `ConfigError` for a vocabulary that the text cannot fill, or too small."""
    tokenizer, trainer = TRAINERS[config.type](config.vocab_size)
    tokenizer.train_from_iterator(iter(sample), trainer)
    if (size := tokenizer.get_vocab_size()) != config.vocab_size:
        told = "the characters alone need" if size > config.vocab_size else "this text yields"
        raise ConfigError(f"tokenizer.vocab_size {config.vocab_size}: {told} {size}; set that, or give another text")
    return tokenizer.to_str()


def _byte_level_bpe(vocab_size: int) -> tuple[Any, Any]:
    """GPT-2's (Radford et al. 2019)."""
    from tokenizers import models, trainers

    tokenizer = _byte_level(models.BPE())
    alphabet = tokenizer.pre_tokenizer.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )


def _byte_level_unigram(vocab_size: int) -> tuple[Any, Any]:
    """A unigram language model (Kudo 2018) over bytes."""
    from tokenizers import models, trainers

    tokenizer = _byte_level(models.Unigram())
    alphabet = tokenizer.pre_tokenizer.alphabet()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )


def _wordpiece(vocab_size: int) -> tuple[Any, Any]:
    """BERT's (Devlin et al. 2019), with case."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(BERT_TOKENS), show_progress=False
    )


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TRAINERS = {"bpe_bytelevel": _byte_level_bpe, "unigram": _byte_level_unigram, "wordpiece": _wordpiece}
