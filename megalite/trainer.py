"""The training loop, and nothing else."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint import Counters, Saver, agree_on_checkpoint, checkpoint_bytes, load_checkpoint
from megalite.checkpoint_folder import check_space, prune, set_aside_newer
from megalite.comm import is_any
from megalite.config.frozen import save_config
from megalite.config.schema import TrainConfig
from megalite.data.feed import Feed
from megalite.data.format import TokenStore
from megalite.engine import Engine, StepResult
from megalite.errors import CheckpointError, MegaliteError, Preempted
from megalite.guard.vitals import Vitals
from megalite.log import get_logger
from megalite.mesh import Mesh
from megalite.metrics.accumulator import LossMeter
from megalite.metrics.base import Row
from megalite.metrics.evaluation import EvaluationInterrupted, evaluate_store
from megalite.metrics.hardware import memory_bytes, mfu
from megalite.metrics.recorder import Recorder
from megalite.models import flops_per_token
from megalite.objectives import build_objective
from megalite.optim import learning_rate
from megalite.sharing import Sharing

log = get_logger(__name__)

_SHOWN_DOCUMENTS = 20  # of a step that was skipped for its numbers


class Trainer:
    """One run on one rank."""

    def __init__(self, config: TrainConfig, mesh: Mesh, vitals: Vitals, sharing: Sharing):
        """Build everything the loop needs, and load the checkpoint to continue from."""
        self.config, self.mesh, self.vitals, self.sharing = config, mesh, vitals, sharing
        self.run_dir = Path(config.run_dir)
        vitals.enter("start", "engine")
        self.engine = Engine(config, mesh)
        self.saver = Saver(self.engine, self.run_dir, sharing.with_rank_0)
        vitals.enter("start", "data")
        self.feed = Feed(config, mesh)
        end_of_document = self.feed.dataset.stores[0].manifest.end_of_document
        self.objective = build_objective(config.objective, config.data, end_of_document)
        self.validation = [(store.source, TokenStore.open(store.path)) for store in config.data.validation]
        vitals.enter("start", "weights")
        self.meter = LossMeter(mesh.device)
        self.counters = self._resume()
        self.last_step = min(config.trainer.steps, config.trainer.stop_after or config.trainer.steps)
        if self.counters.step >= self.last_step:
            log.info("the run stands at step %d of %d: nothing to do", self.counters.step, self.last_step)
        self.flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._check_space()
        self._write_descriptions()

    def run(self) -> None:
        """Train until `trainer.stop_after` or the end, log, evaluate and save on the way.

        Raises `Preempted` when a signal came, with everything saved.
        """
        config, counters = self.config, self.counters
        self.vitals.begin(counters.step)
        self.recorder = Recorder(config, self.mesh, counters.step)
        self._log_use()
        self.feed.start(counters.samples_consumed, range(counters.step + 1, self.last_step + 1))
        self._logged_at, self._logged_step, self._logged_wait = time.perf_counter(), counters.step, 0.0
        try:
            if counters.evaluation_due:  # the run was stopped before it had
                self._conclude_step({}, evaluates=True, stops=False)
            while counters.step < self.last_step:
                if self.feed.leaves_out(counters.step + 1):
                    self._count_samples()
                    stops, row = False, {}
                else:
                    result = self._step()
                    stops = self._settle(result)
                    row = self._training_row(result) if self._is_due(config.trainer.log_every) else {}
                self.recorder.advance()
                self._conclude_step(row, self._is_due(config.trainer.eval_every), stops)
            self._finish_save(is_last=True)
            self._log_use()
        finally:
            self.vitals.enter("other", "closing")
            self.feed.close()
            self.recorder.close()
            self._mark()

    def _step(self) -> StepResult:
        """One optimizer step over the global batch."""
        step, trainer = self.counters.step, self.config.trainer
        self._learning_rate = learning_rate(self.config.schedule, self.config.optimizer.lr, step, trainer.steps)
        self.vitals.enter("data", step=step + 1)
        samples = self.feed.next()
        self.vitals.enter("step")
        # To the device first: cutting a pinned tensor on the host would make copies that are not pinned.
        batches = [self.objective.batch(ids.to(self.mesh.device, non_blocking=True)) for ids in samples]
        requests = bool(self.vitals.stop_signal), self.saver.is_busy
        result = self.engine.train_step(batches, step, self._learning_rate, requests)
        self.meter.add(result.loss)
        return result

    def _settle(self, result: StepResult) -> bool:
        """Count the step, and go on with what all ranks have agreed on in it; returns whether the run is to stop."""
        self._count_samples()
        self._count_skipped(result)
        stops, writing = result.requests()
        if self.saver.is_pending and not writing:
            self._try_to_save(self.saver.advance)
        self.vitals.enter("other")
        return bool(stops)

    def _mark(self) -> None:
        self.vitals.mark(self.counters.step, self.saver.saved_step)

    def _conclude_step(self, row: Row, evaluates: bool, stops: bool) -> None:
        """Evaluate, log and save what is due at this step. Raises `Preempted` if the run `stops`."""
        counters, checkpoint = self.counters, self.config.checkpoint
        evaluation: dict[str, float] = {}
        counters.evaluation_due = evaluates
        if evaluates and not stops:
            try:
                evaluation = self._evaluate()
                counters.evaluation_due = False
            except EvaluationInterrupted:
                stops = True
        if row or evaluation:
            self.recorder.log(counters.step, {**row, **evaluation})
            self._mark()
        # After the row: a run killed in between repeats the step and its row, and loses neither.
        lasts = stops or self._is_due(checkpoint.save_every)
        if lasts or (checkpoint.ephemeral_every and self._is_due(checkpoint.ephemeral_every)):
            self._save(evaluation, ephemeral=not lasts, is_last=stops or counters.step == self.last_step)
        if stops and (counters.step < self.last_step or counters.evaluation_due):
            raise Preempted(
                f"stopped by a signal at step {counters.step} of {self.last_step}: it is saved, and the same command "
                "goes on"
            )

    def _log_use(self) -> None:
        counters = self.counters
        if self.mesh.rank == 0:
            self.feed.log_use(counters.step, counters.samples_consumed, self.last_step, counters.data_since_sample)

    def _count_samples(self) -> None:
        counters, batch = self.counters, self.config.trainer.global_batch_size
        counters.step += 1
        counters.samples_consumed += batch
        counters.tokens_seen += batch * self.config.data.sequence_length

    def _count_skipped(self, result: StepResult) -> None:
        counters, trainer = self.counters, self.config.trainer
        if result.applied:
            counters.skipped_in_a_row = 0
            return
        counters.skipped_steps += 1
        counters.skipped_in_a_row += 1
        if self.engine.seeks_loss_scale:
            log.warning("step %d was skipped: fp16 overflowed; the loss scale is lowered", counters.step)
            return
        samples = range(counters.samples_consumed - trainer.global_batch_size, counters.samples_consumed)
        documents = self.feed.documents(samples)
        log.warning(
            "step %d was skipped: inf or nan in the gradients. Its batch holds %d documents: %s%s. To leave it out in "
            "another try: data.skip_steps=[[%d,%d]]",
            counters.step,
            len(documents),
            ", ".join(documents[:_SHOWN_DOCUMENTS]),
            ", ..." if len(documents) > _SHOWN_DOCUMENTS else "",
            counters.step,
            counters.step,
        )
        if counters.skipped_in_a_row >= trainer.max_skipped_steps:
            self._finish_save(is_last=False, goes_on=True)  # of a step before them; what ended the run is said below
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
        wait = (self.feed.wait_seconds - self._logged_wait) / steps
        self._logged_at, self._logged_step, self._logged_wait = now, self.counters.step, self.feed.wait_seconds
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
        """Every validation source; the time it takes does not count as step time. Raises `EvaluationInterrupted`."""
        self.vitals.enter("evaluate")
        started = time.perf_counter()
        row: dict[str, float] = {}
        for source, store in self.validation:
            rows = self.config.trainer.micro_batch_size
            row |= evaluate_store(
                self.engine.evaluate, self.objective, store, source, self.mesh, rows, self._is_interrupted
            )
        self._logged_at += time.perf_counter() - started
        self.vitals.enter("other")
        return row

    def _is_interrupted(self) -> bool:
        self.vitals.enter("evaluate")  # it moves
        return is_any(bool(self.vitals.stop_signal), self.mesh.world, self.mesh.device)

    def _save(self, evaluation: dict[str, float], ephemeral: bool, is_last: bool) -> None:
        started = time.perf_counter()
        self.counters.loss_sum, self.counters.loss_count = self.meter.state()
        # What became of the one before is said, but where this one is the last it decides.
        self._finish_save(is_last=False, goes_on=is_last)
        self._try_to_save(lambda: self.saver.save(self.counters, evaluation, ephemeral), is_last)
        if is_last:
            self._finish_save(is_last)
        self._logged_at += time.perf_counter() - started

    def _finish_save(self, is_last: bool, goes_on: bool = False) -> None:
        """Wait for the save that is pending, if any; the watchdog gives it its own time."""
        if self.saver.is_pending:
            self._try_to_save(self.saver.finish, is_last, goes_on, "files")

    def _try_to_save(
        self, work: Callable[[], None], is_last: bool = False, goes_on: bool = False, detail: str = ""
    ) -> None:
        """Do a part of saving; what to do about an error is for `checkpoint.on_save_error` to say, unless `goes_on`."""
        self.vitals.enter("save", detail)
        try:
            work()
        except CheckpointError as error:
            if is_last or not (goes_on or self.config.checkpoint.on_save_error == "continue"):
                raise
            log.warning("%s; training goes on to the next save, the checkpoints before are untouched", error)
        self.vitals.enter("other")
        self._mark()

    def _resume(self) -> Counters:
        folder = agree_on_checkpoint(
            self.config.checkpoint.resume, self.run_dir, self.sharing, lambda: self.vitals.enter("start", "weights")
        )
        if folder is None:
            self.engine.init_weights()
            counters = Counters()
        else:
            counters = load_checkpoint(self.engine, folder)
            self.meter.restore(counters.loss_sum, counters.loss_count)
            log.info("continuing from %s", folder)
        checkpoints = self.run_dir / "checkpoints"
        if self.sharing.is_first:
            set_aside_newer(checkpoints, counters.step)
            if folder and folder.parent == checkpoints:
                prune(checkpoints, self.config.checkpoint)  # what a kill left of the last save
        return counters

    def _check_space(self) -> None:
        """Raise `ResourceError` when the disk cannot hold a checkpoint; better now than at the first save."""
        if not self.sharing.is_first:
            return
        needed, keep = checkpoint_bytes(self.engine), self.config.checkpoint.keep
        free, text = check_space(self.run_dir, needed)
        if free < needed * (keep + 1):
            log.warning("%s: too little for checkpoint.keep=%d and the next", text, keep)

    def _write_descriptions(self) -> None:
        """What a person, or a later command, wants beside the checkpoints.

        Only now: a start that failed before leaves the descriptions of what is there as they were.
        """
        if not self.sharing.is_first:
            return
        save_config(self.config, self.run_dir / "config.yaml")
        (self.run_dir / "ds_config.json").write_text(json.dumps(self.engine.ds_config, indent=2) + "\n")
        tokenizer = Path(self.config.data.train[0].path) / "tokenizer"
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, self.run_dir / "tokenizer", dirs_exist_ok=True)
