"""Generated text for the tests of the data rooms: two languages, and everything that text processing likes to lose."""

import json
import random
from pathlib import Path

from megalite.config.schema_data import (
    DataBuildConfig,
    ReaderConfig,
    StoreTokenizerConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
)
from megalite.data_tools.tokenizer_training import train_tokenizer

WORDS = (
    *("the", "king", "of", "night", "and", "day", "walks", "by", "a", "river", "that", "runs", "under", "stars"),
    *("into", "open", "sea", "where", "no", "ship", "has", "sailed"),
)
HAN = "春眠不覺曉處處聞啼鳥夜來風雨聲花落知多少床前明月光疑是地上霜舉頭望明月低頭思故鄉"
TRICKY = (
    "<s>a</s> <unk><pad> <|endoftext|> [SEP] <eos> <0x41>",
    "  leading,   inner and trailing  ",
    "tab\tnew\nline\n\n\nend\n",
    "\r\n\u00a0\u3000\u200b\u202e",
    "▁▁ stands for a space ▅ ▁",
    "\x00\x01\x7f controls \ufeff",
    "ﬁ Ａ ① é e\u0301 \u1e9b\u0323",
    "🏳️‍🌈 𝔘𝔫𝔦 \U0010ffff",
    "x" * 5000,
    "春\n<s>眠</s>",
)


def english(rng: random.Random, lines: int = 8) -> str:
    return "\n".join(" ".join(rng.choices(WORDS, k=7)).capitalize() + rng.choice(".,?") for _ in range(lines))


def chinese(rng: random.Random, lines: int = 4) -> str:
    return "\n".join(
        "".join(rng.choices(HAN, k=5)) + "，" + "".join(rng.choices(HAN, k=5)) + "。" for _ in range(lines)
    )


def texts(count: int = 60, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    plain = [english(rng) if i % 2 else chinese(rng) for i in range(count)]
    return [*plain, *TRICKY]


def write_jsonl(path: Path, rows: list, **dump) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, **dump) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, vocab_size: int = 400, **changes) -> Path:
    """A small trained tokenizer below `folder`."""
    source = write_jsonl(folder / "tokenizer_text.jsonl", [{"text": text} for text in texts()])
    config = TokenizerTrainConfig(
        input=(str(source),),
        output=str(folder / "tokenizer"),
        tokenizer=TokenizerConfig(vocab_size=vocab_size, **changes),
        reader=ReaderConfig(),
    )
    return train_tokenizer(config)


def build_config(
    inputs, output: Path, tokenizer: Path, reader: ReaderConfig | None = None, **changes
) -> DataBuildConfig:
    values = dict(validation_fraction=0.2, workers=1) | changes
    return DataBuildConfig(
        input=tuple(str(path) for path in inputs),
        output=str(output),
        tokenizer=StoreTokenizerConfig(path=str(tokenizer)),
        reader=reader or ReaderConfig(),
        **values,
    )
