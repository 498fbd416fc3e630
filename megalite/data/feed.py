"""The batches of a run, step after step, read ahead."""

from collections.abc import Sequence

import torch

from megalite.config.schema import TrainConfig
from megalite.data.dataset import build_dataset
from megalite.data.loader import Loader
from megalite.data.prefetch import Prefetcher
from megalite.log import get_logger
from megalite.mesh import Mesh

log = get_logger(__name__)


class Feed:
    """This data rank's micro batches; steps are counted from 1, as `megalite data trace` does."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        """Open the training stores. Raises as `build_dataset` and `Loader` do."""
        trainer = config.trainer
        self._config, self._batch = config, trainer.global_batch_size
        self.dataset = build_dataset(config.data, self._batch, config.seed)
        if (num_sequences := sum(view.num_units for view in self.dataset.views)) < self._batch:
            log.warning(
                "the training stores hold %d sequences of %d tokens, fewer than trainer.global_batch_size=%d: every "
                "step repeats some",
                num_sequences,
                config.data.sequence_length,
                self._batch,
            )
        pin = mesh.device.type == "cuda"
        self._loader = Loader(self.dataset, self._batch, trainer.micro_batch_size, mesh.data.rank, mesh.data.size, pin)
        self._ahead: Prefetcher[list[torch.Tensor]] | None = None

    def start(self, samples_consumed: int, steps: range) -> None:
        """Begin to read the batches of `steps`, but for those left out; the first of all begins at this sample."""
        starts = [
            samples_consumed + number * self._batch for number, step in enumerate(steps) if not self.leaves_out(step)
        ]
        self._ahead = Prefetcher(self._loader.micro_batches, starts, self._config.data.prefetch)

    def leaves_out(self, step: int) -> bool:
        """Whether `data.skip_steps` says that nothing is learnt of this step's batch."""
        return any(first <= step <= last for first, last in self._config.data.skip_steps)

    def next(self) -> list[torch.Tensor]:
        """The micro batches of the next step that is not left out, on the host; see `Loader`."""
        assert self._ahead is not None, "start() comes first"
        return self._ahead.next()

    @property
    def wait_seconds(self) -> float:
        """That `next` has taken, all calls together."""
        return self._ahead.wait_seconds if self._ahead else 0.0

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead:
            self._ahead.close()

    def documents(self, samples: Sequence[int]) -> list[str]:
        """The documents that samples hold parts of, each once, as SOURCE:INDEX."""
        names = [store.source for store in self._config.data.train]
        parts = self.dataset.documents(samples)
        return list(dict.fromkeys(f"{names[part.source]}:{part.document}" for part in parts))

    def log_use(self, step: int, samples_consumed: int, last_step: int, since_sample: int) -> None:
        """Say what the run has drawn from every training store since a sample, and what it will have in the end."""
        data, use = self._config.data, self.dataset.use
        in_the_end = use(samples_consumed + (last_step - step) * self._batch)
        for store, before, now, later in zip(
            data.train, use(since_sample), use(samples_consumed), in_the_end, strict=True
        ):
            tokens = (now.samples - before.samples) * data.sequence_length
            text = f"step {step}: {store.source}: {tokens:,} tokens drawn, {now.epochs - before.epochs:.2f} epochs"
            text += " since the data were changed" if since_sample else ""
            log.info(text if step == last_step else f"{text}; {later.epochs - before.epochs:.2f} by step {last_step}")
