"""How far a run is: what a checkpoint brings back besides tensors."""

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts since step 0. `samples_consumed` is the position in the sample order, whatever the batch sizes were."""

    step: int = 0
    samples_consumed: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_sum: float = 0.0  # of the steps since the last logged row, nats a token
    loss_count: int = 0
    data_since_step: int = 0  # the present stores, weights, order and batch size hold from here on
    data_since_sample: int = 0
    evaluation_due: bool = False  # the run was stopped before it had evaluated at this step
