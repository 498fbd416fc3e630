"""The ends of a language model, split over the tensor axis along the vocabulary.

The vocabulary is padded to a constant multiple whatever the layout, so that the same run has the same rows on any
number of ranks; padded rows are zero, never looked up, and count as minus infinity in the softmax.

Legend: B batch, S sequence, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.config.validate_layout import VOCAB_MULTIPLE
from megalite.layers.cross_entropy import Target, Vocabulary, linear_cross_entropy, local_rows, token_losses
from megalite.layers.region import column_linear, sum_partial
from megalite.layers.shard import Init, Shard, make_parameter
from megalite.mesh import Axis


def vocab_shard(vocab_size: int, hidden_size: int) -> Shard:
    """Rows of the vocabulary split over the tensor axis: of the embedding, and of the output head."""
    return Shard((vocab_size, hidden_size), 0, (vocab_size,), multiple=VOCAB_MULTIPLE)


class VocabParallelEmbedding(nn.Module):
    """Y = E[tokens] with the rows of E split: rank i looks up the tokens it holds, zero elsewhere, and the sum is Y.

    Shapes: tokens_BS (int64, 0 <= token < vocab_size) -> (B, S, D), equal on all ranks or parts of the sequence.
    Communication: see `region.sum_partial`.
    """

    def __init__(self, vocab_size: int, hidden_size: int, axis: Axis, init: Init) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.axis = vocab_size, hidden_size, axis
        self.weight = make_parameter(vocab_shard(vocab_size, hidden_size), init, axis)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """See the class."""
        if self.axis.size == 1:
            return F.embedding(tokens_BS, self.weight)
        local_BS, held_BS = local_rows(tokens_BS, self.weight.shape[0], self.axis)
        x_BSD = F.embedding(local_BS, self.weight) * held_BS.unsqueeze(-1)
        return sum_partial(x_BSD, self.axis)

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        return f"{self.vocab_size} x {self.hidden_size}, rank {self.axis.rank} of {self.axis.size}"


class VocabParallelLinear(nn.Module):
    """The output head: logits = X W^T with the rows of W (the vocabulary) split, or the loss of labels; no bias.

    See `apply_head`.
    """

    def __init__(self, vocabulary: Vocabulary, hidden_size: int, init: Init) -> None:
        super().__init__()
        self.vocabulary, self.hidden_size = vocabulary, hidden_size
        self.weight = make_parameter(vocab_shard(vocabulary.size, hidden_size), init, vocabulary.axis)

    def forward(self, x_BSD: Tensor, target: Target | None) -> Tensor:
        """See the class."""
        return apply_head(x_BSD, self.weight, self.vocabulary, target)

    def extra_repr(self) -> str:
        """Unsharded size and this rank's place."""
        axis = self.vocabulary.axis
        return f"{self.hidden_size} -> {self.vocabulary.size}, rank {axis.rank} of {axis.size}"


def apply_head(x_BSD: Tensor, weight: Tensor, vocabulary: Vocabulary, target: Target | None) -> Tensor:
    """Logits without a `target`; with one a loss, for which all logits never exist at once.

    `weight` is the head's own or the embedding's (tied), this rank's rows. Shapes: x_BSD, equal on all ranks or parts
    of the sequence -> logits (B, S, padded V / size), split, whose padded columns hold no meaning; losses_BS; or a
    scalar where the target has weights. Communication: `region.column_linear`, `token_losses`, `linear_cross_entropy`.
    """
    if target is None:
        logits, cap = column_linear(x_BSD, weight, None, vocabulary.axis), vocabulary.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)
    if target.weights_BS is None:
        return token_losses(x_BSD, weight, target.labels_BS, vocabulary)
    return linear_cross_entropy(x_BSD, weight, target, vocabulary)
