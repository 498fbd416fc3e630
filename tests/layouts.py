"""The layouts a run may have, as cells of a product, and a cover of it in which every pair of values meets."""

import itertools
from dataclasses import dataclass

from megalite.config.schema import TrainConfig
from tests.runs import tiny_config

WORLD, GLOBAL_BATCH, LENGTH, STEPS = 4, 12, 32, 10
FACTORS = {
    "family": ("gpt", "llama"),
    "tensor": (1, 2, 4),
    "sequence": (False, True),
    "context": ((1, "auto"), (2, "ulysses"), (2, "ring")),
    "zero_stage": (0, 1, 2, 3),
    "accumulation": (1, 3),
    "recompute": ("none", "selective", "full"),
    "documents": (False, True),
}
FAMILIES = {
    "gpt": {"num_attention_heads": 8},
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 4, "norm": "rmsnorm", "activation": "swiglu",
              "positions": "rotary", "bias": False, "tied_embeddings": False, "ffn_hidden_size": 160},
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """One cell; the data axis is what tensor and context leave of four processes."""

    family: str
    tensor: int
    sequence: bool
    context: tuple[int, str]
    zero_stage: int
    accumulation: int
    recompute: str
    documents: bool

    def __str__(self) -> str:
        size, method = self.context
        context = f"-{method}{size}" if size > 1 else ""
        sequence = "-sp" if self.sequence else ""
        rest = f"zero{self.zero_stage}-acc{self.accumulation}-{self.recompute}{'-documents' * self.documents}"
        return f"{self.family}-tp{self.tensor}{sequence}{context}-{rest}"

    @property
    def data(self) -> int:
        """Size of the data axis; 0 where tensor and context alone need more than four processes."""
        return WORLD // (self.tensor * self.context[0])

    @property
    def config(self) -> TrainConfig:
        size, method = self.context
        micro = GLOBAL_BATCH // max(self.data * self.accumulation, 1)
        model = FAMILIES[self.family] | {"num_layers": 2, "hidden_size": 64, "max_sequence_length": LENGTH}
        return tiny_config(
            "unused",
            model=model | {"vocab_size": 256},
            parallel={"tensor": self.tensor, "sequence": self.sequence, "context": size, "context_method": method},
            engine={"zero_stage": self.zero_stage, "recompute": self.recompute},
            trainer={"steps": 50, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": micro},
            schedule={"warmup_steps": 10},
            data={
                "train": "unused",
                "sequence_length": LENGTH,
                "document_attention": self.documents,
                "document_positions": self.documents,
            },
        )


def all_layouts() -> list[Layout]:
    """The whole product, accepted or not."""
    return [Layout(*values) for values in itertools.product(*FACTORS.values())]


def pairwise_cover() -> list[Layout]:
    """Few of the accepted layouts, in which any two values that go together do so at least once.

    Greedy: the layout with most pairs not met yet, until none is left. The same every time.
    """
    layouts = [layout for layout in all_layouts() if layout.data]
    missing = {pair for layout in layouts for pair in _pairs(layout)}
    cover = []
    while missing:
        best = max(layouts, key=lambda layout: len(missing & _pairs(layout)))
        cover.append(best)
        missing -= _pairs(best)
    return cover


def _pairs(layout: Layout) -> frozenset[tuple]:
    values = [(name, getattr(layout, name)) for name in FACTORS]
    return frozenset(itertools.combinations(values, 2))
