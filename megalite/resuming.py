"""What may change between a checkpoint and the run that goes on from it, where the disk has a say."""

import copy
from typing import Any

from megalite.checkpoint_format import Manifest
from megalite.config.changes import check_changes, safety_of
from megalite.config.compose import config_values
from megalite.config.schema import TrainConfig
from megalite.data.format import TokenStore
from megalite.errors import CheckpointError


def check_resume(config: TrainConfig, manifest: Manifest) -> list[str]:
    """Whether `config` may continue from a checkpoint; returns what changed and what it means, as text.

    Raises `CheckpointError` for changes of the configuration that are refused or not allowed, and for training stores
    with other content. A store that only moved or has another name is the same.
    """
    values = config_values(config)
    if not manifest.stores:  # imported weights, of no training: any training may begin with them
        return check_changes({"model": manifest.config["model"]}, {"model": values["model"]}, ())
    digests = [TokenStore.open(store.path).digest for store in config.data.train]
    before = copy.deepcopy(manifest.config)
    notes = _take_later_schedule(before, values, manifest.samples_consumed)
    same_weights = [store["weight"] for store in before["data"]["train"]] == [s.weight for s in config.data.train]
    if manifest.stores == digests and same_weights:
        before["data"]["train"] = values["data"]["train"]
    notes += check_changes(before, values, config.checkpoint.allow_changes)
    notes += _passed_skips(before["data"].get("skip_steps", []), values["data"]["skip_steps"], manifest.step)
    if manifest.stores != digests and "data.train" not in config.checkpoint.allow_changes:
        raise CheckpointError(
            f"data.train: the stores are not those that the checkpoint of step {manifest.step} was trained on: they "
            "were built again since then; restore them, or allow the change with checkpoint.allow_changes=[data.train]"
        )
    return notes


def world_size_note(config: TrainConfig, manifest: Manifest, world_size: int) -> list[str]:
    """That the number of processes changed, which stands in no key."""
    before = manifest.topology.get("world_size", world_size)
    meaning = safety_of("parallel", config.model.dropout)
    return [f"{world_size} processes, before {before} ({meaning})"] if before != world_size else []


def _passed_skips(old: list[Any], new: list[Any], step: int) -> list[str]:
    """What a changed `data.skip_steps` says of steps that were taken already."""
    changed = [pair for pair in [*old, *new] if (pair in old) != (pair in new)]
    return [
        f"data.skip_steps: [{first}, {last}] begins before the checkpoint's step {step}: what was learnt by then "
        "stays; checkpoint.resume=PATH goes on from an earlier one"
        for first, last in changed
        if first <= step
    ]


def draws_alike(config: TrainConfig, manifest: Manifest) -> bool:
    """Whether what the run drew up to the checkpoint is what `config` would draw; of imported weights nothing was."""
    before, values = copy.deepcopy(manifest.config), config_values(config)
    if not manifest.stores:
        return True
    try:
        _take_later_schedule(before, values, manifest.samples_consumed)
    except CheckpointError:
        return False

    def order(values: dict[str, Any]) -> list[Any]:
        data = values["data"]
        weights = [store["weight"] for store in data["train"]]
        steps = values["trainer"]["global_batch_size"]
        return [values["seed"], steps, weights, data["schedule"], data["sequence_length"], data["packing"]]

    digests = [TokenStore.open(store.path).digest for store in config.data.train]
    return order(before) == order(values) and manifest.stores == digests


def _take_later_schedule(before: dict[str, Any], values: dict[str, Any], samples_consumed: int) -> list[str]:
    """Weights that begin at or after the checkpoint may change: nothing was drawn by them. Returns that as text.

    What was drawn must have been drawn by the same weights, or units would be repeated or left out. Raises
    `CheckpointError` where only the batch size moves them.
    """

    def begun(config: dict[str, Any]) -> list[Any]:
        batch = config["trainer"]["global_batch_size"]
        changes = [(change["step"] * batch, change["weights"]) for change in config["data"].get("schedule", [])]
        return [(sample, weights) for sample, weights in changes if sample < samples_consumed]

    old, new = before["data"].get("schedule", []), values["data"]["schedule"]
    drawn_by = begun(before)
    if drawn_by == begun(values):
        if old == new:
            return []
        before["data"]["schedule"] = new
        return [f"data.schedule: {old} -> {new}, from where the run stands"]
    if old == new and not {"data", "data.schedule"} & set(values["checkpoint"]["allow_changes"]):
        raise CheckpointError(
            "data.schedule: its steps count batches of trainer.global_batch_size, which changed: give the steps that "
            f"leave the weights drawn by where they began, at samples {[sample for sample, _ in drawn_by]}, or allow "
            "the change with checkpoint.allow_changes=[data.schedule]"
        )
    return []
