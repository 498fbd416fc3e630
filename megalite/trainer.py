"""The training loop, and nothing else."""

import json
import shutil
import time
from pathlib import Path

import torch

from megalite.checkpoint import Counters, agree_on_checkpoint, load_checkpoint, save_checkpoint
from megalite.checkpoint_format import set_aside_newer
from megalite.config.compose import save_config
from megalite.config.schema import TrainConfig
from megalite.data.dataset import build_dataset
from megalite.data.format import TokenStore
from megalite.data.loader import Loader
from megalite.data.prefetch import Prefetcher
from megalite.engine import Engine, StepResult
from megalite.errors import MegaliteError
from megalite.log import get_logger
from megalite.mesh import Mesh
from megalite.metrics.accumulator import LossMeter
from megalite.metrics.evaluation import evaluate_store
from megalite.metrics.hardware import memory_bytes, mfu
from megalite.metrics.recorder import Recorder
from megalite.models import flops_per_token
from megalite.objectives import build_objective
from megalite.optim import learning_rate

log = get_logger(__name__)


class Trainer:
    """One run on one rank."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        """Build everything the loop needs, and load the checkpoint to continue from."""
        self.config = config
        self.mesh = mesh
        self.run_dir = Path(config.run_dir)
        self.engine = Engine(config, mesh)
        self.loader = self._build_loader()
        end_of_document = self.loader.dataset.stores[0].manifest.end_of_document
        self.objective = build_objective(config.objective, config.data, end_of_document)
        self.validation = [(store.source, TokenStore.open(store.path)) for store in config.data.validation]
        self.counters = self._resume()
        self.last_step = min(config.trainer.steps, config.trainer.stop_after or config.trainer.steps)
        if self.counters.step >= self.last_step:
            log.info("the run stands at step %d of %d: nothing to do", self.counters.step, self.last_step)
        self.meter = LossMeter(mesh.device)
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._write_descriptions()

    def run(self) -> None:
        """Train until `trainer.stop_after` or the end, log, evaluate and save on the way."""
        recorder = Recorder(self.config, self.mesh, self.counters.step)
        self._log_sources()
        self._logged_at, self._logged_step, self._logged_wait = time.perf_counter(), self.counters.step, 0.0
        self.batches = self._prefetch()
        try:
            while self.counters.step < self.last_step:
                result = self._step()
                recorder.advance()
                saves = self._is_due(self.config.checkpoint.save_every)
                # A save has a row: what follows it averages the same steps whether or not the run was stopped here.
                row = self._training_row(result) if saves or self._is_due(self.config.trainer.log_every) else {}
                if self._is_due(self.config.trainer.eval_every):
                    row |= self._evaluate()
                if row:
                    recorder.log(self.counters.step, row)
                # After the row: a run killed in between repeats the step and its row, and loses neither.
                if saves:
                    self._save()
            self._log_sources()
        finally:
            self.batches.close()
            recorder.close()

    def _step(self) -> StepResult:
        """One optimizer step over the global batch."""
        step, trainer = self.counters.step, self.config.trainer
        rate = learning_rate(self.config.schedule, self.config.optimizer.lr, step, trainer.steps)
        # To the device first: cutting a pinned tensor on the host would make copies that are not pinned.
        samples = [ids.to(self.mesh.device, non_blocking=True) for ids in self.batches.next()]
        batches = [self.objective.batch(ids) for ids in samples]
        result = self.engine.train_step(batches, step, rate)
        self.meter.add(result.loss)
        self._count(result)
        self._learning_rate = rate
        return result

    def _count(self, result: StepResult) -> None:
        counters, trainer = self.counters, self.config.trainer
        counters.step += 1
        counters.samples_consumed += trainer.global_batch_size
        counters.tokens_seen += trainer.global_batch_size * self.config.data.sequence_length
        if result.applied:
            counters.skipped_in_a_row = 0
            return
        counters.skipped_steps += 1
        counters.skipped_in_a_row += 1
        log.warning("step %d was skipped: inf or nan in the gradients", counters.step)
        # fp16 starts with a scale that is too high and skips until it fits; that is no failure.
        if counters.skipped_in_a_row >= trainer.max_skipped_steps:
            raise MegaliteError(
                f"{counters.skipped_in_a_row} steps in a row were skipped for inf or nan in the gradients (the last is "
                f"step {counters.step}); lower optimizer.lr, check the data, or raise trainer.max_skipped_steps"
            )

    def _is_due(self, every: int) -> bool:
        """True on multiples of `every` (0: never before the end) and on the last step."""
        step = self.counters.step
        return step == self.last_step or (every > 0 and step % every == 0)

    def _training_row(self, result: StepResult) -> dict[str, float | int | None]:
        """The figures of the steps since the last row; reading them is the loop's only wait for the device."""
        loss = self.meter.take()
        now, steps = time.perf_counter(), self.counters.step - self._logged_step
        seconds = (now - self._logged_at) / steps
        wait = (self.batches.wait_seconds - self._logged_wait) / steps
        self._logged_at, self._logged_step, self._logged_wait = now, self.counters.step, self.batches.wait_seconds
        tokens_a_step = self.config.trainer.global_batch_size * self.config.data.sequence_length
        return {
            "loss": loss,
            "learning_rate": self._learning_rate,
            "grad_norm": float(result.grad_norm),
            "tokens_seen": self.counters.tokens_seen,
            "tokens_per_second": tokens_a_step / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": wait,
            "mfu": mfu(tokens_a_step / seconds, self.flops_per_token, self.mesh.device, self.mesh.world_size),
            "memory_bytes": memory_bytes(self.mesh.device),
            "skipped_steps": self.counters.skipped_steps,
        }

    def _evaluate(self) -> dict[str, float]:
        """Every validation source; the time it takes does not count as step time."""
        started = time.perf_counter()
        row: dict[str, float] = {}
        for source, store in self.validation:
            rows = self.config.trainer.micro_batch_size
            row |= evaluate_store(self.engine.evaluate, self.objective, store, source, self.mesh, rows)
        self._logged_at += time.perf_counter() - started
        return row

    def _save(self) -> None:
        started = time.perf_counter()
        folder = save_checkpoint(self.engine, self.run_dir, self.counters)
        log.info("saved %s", folder)
        self._logged_at += time.perf_counter() - started

    def _resume(self) -> Counters:
        folder = agree_on_checkpoint(self.config.checkpoint.resume, self.run_dir)
        if folder is None:
            self.engine.init_weights()
            counters = Counters()
        else:
            counters = load_checkpoint(self.engine, folder)
            log.info("continuing from %s", folder)
        if self.mesh.rank == 0:
            set_aside_newer(self.run_dir / "checkpoints", counters.step)
        return counters

    def _build_loader(self) -> Loader:
        config, data = self.config, self.mesh.data
        trainer = config.trainer
        dataset = build_dataset(config.data, trainer.global_batch_size, config.seed)
        num_sequences = sum(view.num_units for view in dataset.views)
        if num_sequences < trainer.global_batch_size:
            log.warning(
                "the training stores hold %d sequences of %d tokens, fewer than trainer.global_batch_size=%d: every "
                "step repeats some",
                num_sequences,
                config.data.sequence_length,
                trainer.global_batch_size,
            )
        pin = self.mesh.device.type == "cuda"
        return Loader(dataset, trainer.global_batch_size, trainer.micro_batch_size, data.rank, data.size, pin)

    def _prefetch(self) -> Prefetcher[list[torch.Tensor]]:
        """Every step's micro batches from here to the last, read ahead."""
        start, batch = self.counters.samples_consumed, self.config.trainer.global_batch_size
        starts = range(start, start + (self.last_step - self.counters.step) * batch, batch)
        return Prefetcher(self.loader.micro_batches, starts, self.config.data.prefetch)

    def _log_sources(self) -> None:
        """What the run has drawn from every training store, and what it will have drawn in the end."""
        step, data, samples = self.counters.step, self.config.data, self.counters.samples_consumed
        if self.mesh.rank != 0:
            return
        dataset = self.loader.dataset
        in_the_end = dataset.use(samples + (self.last_step - step) * self.config.trainer.global_batch_size)
        for store, use, later in zip(data.train, dataset.use(samples), in_the_end, strict=True):
            tokens = use.samples * data.sequence_length
            text = f"step {step}: {store.source}: {tokens:,} tokens drawn, {use.epochs:.2f} epochs"
            log.info(text if step == self.last_step else f"{text}; {later.epochs:.2f} by step {self.last_step}")

    def _write_descriptions(self) -> None:
        """What a person, or a later command, wants beside the checkpoints.

        Only now: a start that failed before leaves the descriptions of what is there as they were.
        """
        if self.mesh.rank != 0:
            return
        save_config(self.config, self.run_dir / "config.yaml")
        (self.run_dir / "ds_config.json").write_text(json.dumps(self.engine.ds_config, indent=2) + "\n")
        tokenizer = Path(self.config.data.train[0].path) / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, self.run_dir / "tokenizer", dirs_exist_ok=True)
