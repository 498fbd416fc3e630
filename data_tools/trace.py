"""Which documents a training step used, and which steps used a document: `megalite data trace`.

The order of samples is a closed form, so a run's configuration and its stores say it all; nothing was recorded.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalite.checkpoint_folder import list_checkpoints
from megalite.checkpoint_format import read_manifest
from megalite.config.frozen import read_config
from megalite.config.schema import TrainConfig
from megalite.config.schema_data import DataTraceConfig
from megalite.config.validate_commands import validate_data_trace
from megalite.data.dataset import BlendedDataset, build_dataset
from megalite.data.format import TokenStore
from megalite.data.skipping import find_document
from megalite.errors import ConfigError
from megalite.resuming import draws_alike
from megalite.tokenizer import Tokenizer

from .store_tools.inspection import store_tokenizer

_SHOWN_TOKENS = 16  # of a document's beginning


@dataclass(frozen=True)
class DocumentUse:
    """A part of a document in a sample."""

    sample: int  # counted from the run's start
    source: str
    store: Path
    document: int  # its index in the store
    start: int  # the part's first token in the document, and the one behind its last
    stop: int
    num_tokens: int  # of the whole document, its end included
    text: str  # how the document begins


@dataclass(frozen=True)
class StepUse:
    """A sample that held a part of the document asked for."""

    step: int
    sample: int
    epoch: int  # of the document's source, from 0


class Trace:
    """A run, opened for questions about its data."""

    def __init__(self, run_dir: str):
        """Read run_dir/config.yaml and open the training stores.

        Raises `ConfigError` or `DataError` for what cannot be read, and `DataError` when the stores are not those that
        the run was trained on. Steps before stores, weights, order or batch size were changed cannot be asked for: the
        configuration of that time is gone.
        """
        self.config: TrainConfig = read_config(Path(run_dir) / "config.yaml")
        self.batch = self.config.trainer.global_batch_size
        self.dataset: BlendedDataset = build_dataset(self.config.data, self.batch, self.config.seed)
        self.steps_so_far = _steps_so_far(Path(run_dir), self.config)
        self.since_step, self._since_sample = self._check(Path(run_dir))
        self._tokenizers: dict[Path, Tokenizer | None] = {}

    def documents(self, step: int) -> Iterator[DocumentUse]:
        """What step `step` (the first is 1) trained on, or would, sample after sample. `ConfigError` out of range."""
        if not self.since_step < step <= self.config.trainer.steps:
            why = " (the data, their weights or the batch size were changed there)" if self.since_step else ""
            raise ConfigError(
                f"step: found {step}, allowed: {self.since_step + 1}{why} to trainer.steps={self.config.trainer.steps}"
            )
        first = self._since_sample + (step - 1 - self.since_step) * self.batch
        for part in self.dataset.documents(range(first, first + self.batch)):
            store, source = self.dataset.stores[part.source], self.config.data.train[part.source].source
            text = self._beginning(store, part.document)
            yield DocumentUse(
                part.sample, source, store.path, part.document, part.start, part.stop, part.num_tokens, text
            )

    def steps(self, document: str) -> list[StepUse]:
        """The samples of the steps so far, after the data were last changed, that held tokens of a document, in order.

        `document`: SOURCE:INDEX, or the store's path for SOURCE. Raises `ConfigError` for one that does not exist.
        """
        source, index = find_document(document, "document", self.config.data, self.dataset.stores)
        view = self.dataset.views[source]
        start, stop = view.store.offsets_of_documents(index, index + 1).tolist()
        found = []
        for unit in view.units_of(start, stop):
            end = self._since_sample + (self.steps_so_far - self.since_step) * self.batch
            samples, epochs = self.dataset.order.samples_of(source, unit, end)
            for sample, epoch in zip(samples.tolist(), epochs.tolist(), strict=True):
                if sample >= self._since_sample:
                    step = self.since_step + (sample - self._since_sample) // self.batch + 1
                    found.append(StepUse(step, sample, epoch))
        return sorted(found, key=lambda use: use.sample)

    def _check(self, run_dir: Path) -> tuple[int, int]:
        """The step and the sample from which the run's data have been as they are now."""
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        if not checkpoints:
            return 0, 0
        manifest = read_manifest(checkpoints[-1])
        if not draws_alike(self.config, manifest):
            return manifest.step, manifest.samples_consumed  # changed when the run went on from there
        return manifest.data_since_step, manifest.data_since_sample

    def _beginning(self, store: TokenStore, document: int) -> str:
        """A document's first words, on one line; its first ids where the store holds no tokenizer."""
        if store.path not in self._tokenizers:
            self._tokenizers[store.path] = store_tokenizer(store) if store.manifest.tokenizer else None
        start, stop = store.offsets_of_documents(document, document + 1).tolist()
        ids = store.tokens(start, min(stop - 1, start + _SHOWN_TOKENS)).tolist()
        tokenizer = self._tokenizers[store.path]
        return " ".join(tokenizer.decode(ids).split()) if tokenizer else str(ids)


def open_trace(config: DataTraceConfig) -> Trace:
    """The run that a command asks about. Raises `ConfigError` for a setting that cannot work; see also `Trace`."""
    validate_data_trace(config)
    return Trace(config.run_dir)


def _steps_so_far(run_dir: Path, config: TrainConfig) -> int:
    """The step of the last row of metrics.jsonl; without one, all that are planned."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return config.trainer.steps
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a row that was cut off when the run was killed
    return 0
