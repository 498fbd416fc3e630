"""Encode and decode with any tokenizer: a folder of ours, SentencePiece, a tokenizer.json, GPT-2's two files.

Text is only ever text: a document that spells out `</s>` or `<|endoftext|>` gets ordinary ids, which a check at loading
holds every tokenizer to. Training a tokenizer lives in `data_tools`.
"""

from megalite.tokenizer.base import CONFIG, HF_JSON, SP_MODEL, Tokenizer, config_text
from megalite.tokenizer.encoder import Encoder
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.sentencepiece_model import SentencePieceTokenizer

__all__ = [
    "CONFIG",
    "HF_JSON",
    "SP_MODEL",
    "Encoder",
    "SentencePieceTokenizer",
    "Tokenizer",
    "config_text",
    "load_tokenizer",
]
