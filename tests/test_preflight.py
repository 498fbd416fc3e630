import dataclasses
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest

from megalite.checkpoint_folder import commit, create_temporary
from megalite.checkpoint_format import Manifest, read_manifest
from megalite.config.compose import compose_train, config_values
from megalite.config.schema import WeightsConfig
from megalite.data.format import TokenStore
from megalite.data.packing import write_packing
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.preflight import preflight
from megalite.resuming import check_resume, world_size_note
from tests.stores import make_store


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    make_store(root / "a")
    make_store(root / "same")
    make_store(root / "other", tokenizer="b")
    make_store(root / "unnamed", tokenizer=None)
    make_store(root / "large", vocab_size=300)
    return root


@pytest.fixture
def config(stores, tmp_path):
    return compose_train([f"data.train={stores}/a", f"run_dir={tmp_path}/run", "run_name=x"])


def with_data(config, train, validation=()):
    as_stores = [
        tuple(dataclasses.replace(config.data.train[0], path=str(p)) for p in paths) for paths in (train, validation)
    ]
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, train=as_stores[0], validation=as_stores[1])
    )


def with_group(config, group, **changes):
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **changes)})


def test_the_vocabulary_is_that_of_the_largest_store(config, stores):
    assert preflight(config).model.vocab_size == 200
    with_large = with_data(config, [stores / "a"], [stores / "large"])
    assert preflight(with_large) == with_group(with_large, "model", vocab_size=300)
    for given in (200, 50257):
        assert preflight(with_group(config, "model", vocab_size=given)).model.vocab_size == given


def test_a_vocabulary_that_is_too_small(config, stores):
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size: found 199, .* vocabulary of 200; allowed: 200 or more, or n"
    ):
        preflight(with_group(config, "model", vocab_size=199))
    with pytest.raises(ConfigError, match="vocabulary of 300"):
        preflight(with_group(with_data(config, [stores / "a"], [stores / "large"]), "model", vocab_size=200))


@pytest.mark.parametrize("key", ["data.train", "data.validation"])
def test_a_store_that_is_not_there(config, stores, tmp_path, key):
    paths = [[stores / "a"], [stores / "same"]]
    paths[key == "data.validation"] = [stores / "a", tmp_path / "gone"]
    with pytest.raises(DataError, match=rf"^{key}: {tmp_path}/gone is not a token store: it has no manifest\.json"):
        preflight(with_data(config, *paths))


@pytest.mark.parametrize(
    "file", ["tokens_00000.bin", "document_offsets_00000.bin", "manifest.json", "tokenizer/tokenizer.model"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_store(config, tmp_path, file, damage):
    path = make_store(tmp_path / "store") / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"^data\.train: .*store"):
        preflight(with_data(config, [tmp_path / "store"]))


def test_different_tokenizers(config, stores):
    assert preflight(with_data(config, [stores / "a", stores / "same"], [stores / "unnamed"]))
    for train, validation in (
        (["a", "other"], []),
        (["a"], ["other"]),
        (["unnamed", "a"], ["other"]),
    ):
        chosen = with_data(config, [stores / p for p in train], [stores / p for p in validation])
        with pytest.raises(
            ConfigError, match=r"different tokenizers \(.*/a: a000.*/other: b000.*\); build them with the s"
        ):
            preflight(chosen)


def test_validation_text_that_is_trained_on_is_noticed(config, stores, tmp_path, caplog):
    """By content: a copy under another name too."""
    caplog.set_level(logging.WARNING)
    preflight(with_data(config, [stores / "a"], [stores / "unnamed"]))
    assert not caplog.messages
    shutil.copytree(stores / "a", copy := tmp_path / "copy")
    preflight(with_data(config, [stores / "a"], [copy]))
    assert caplog.messages == [f"data.validation: {copy} is trained on too: its figures say nothing about new text"]


def test_a_store_that_is_not_packed(config, tmp_path):
    packed = with_data(config, [make_store(tmp_path / "a")])
    packed = with_group(packed, "data", packing="best_fit", sequence_length=64)
    with pytest.raises(DataError, match=r"not packed yet; `megalite data pack .*packing=best_fit sequence_length=64`"):
        preflight(packed)
    write_packing(TokenStore.open(tmp_path / "a"), "best_fit", 64)
    assert preflight(packed)


def test_a_sequence_longer_than_a_store(config, stores, tmp_path):
    make_store(tmp_path / "short", documents=1, length=49)  # 50 tokens with the end of the document
    both = with_data(config, [stores / "a", tmp_path / "short"])
    assert preflight(with_group(both, "data", sequence_length=49))
    with pytest.raises(
        ConfigError, match=r"data\.sequence_length: found 50, .*short holds only 50 tokens; .* at most 49"
    ):
        preflight(with_group(both, "data", sequence_length=50))
    # Evaluation takes documents as they come.
    assert preflight(with_data(config, [stores / "a"], [tmp_path / "short"]))


def test_a_missing_library(config, monkeypatch):
    wanted = with_group(config, "logging", tensorboard=True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: .*pip install megalite\[tensorboard\]"):
        preflight(wanted)
    assert preflight(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert preflight(wanted)


class TestResume:
    @pytest.fixture
    def saved(self, config):
        """The configuration of a run that has saved a checkpoint."""
        save(config, 10)
        return config

    def test_the_same_configuration(self, saved, caplog):
        assert preflight(saved) == with_group(saved, "model", vocab_size=200)
        assert caplog.records == []

    def test_safe_changes_are_told(self, saved):
        manifest = read_manifest(Path(saved.run_dir) / "checkpoints/step_00000010")
        changed = preflight(with_group(saved, "parallel", tensor=2))
        assert check_resume(changed, manifest) == ["parallel.tensor: 1 -> 2 (safe)"]

    def test_skips_that_come_too_late_are_told(self, saved):
        manifest = read_manifest(Path(saved.run_dir) / "checkpoints/step_00000010")
        ready = preflight(saved)
        early, note = check_resume(with_group(ready, "data", skip_steps=((9, 12),)), manifest)
        assert early == "data.skip_steps: [] -> [[9, 12]] (safe)"
        assert "begins before the checkpoint's step 10" in note
        assert len(check_resume(with_group(ready, "data", skip_steps=((11, 12),)), manifest)) == 1

    def test_another_number_of_processes_is_told(self, saved):
        manifest = read_manifest(Path(saved.run_dir) / "checkpoints/step_00000010")
        manifest = dataclasses.replace(manifest, topology={"world_size": 2})
        assert world_size_note(saved, manifest, 2) == []
        assert world_size_note(saved, manifest, 4) == ["4 processes, before 2 (safe)"]
        (note,) = world_size_note(with_group(saved, "model", dropout=0.1), manifest, 4)
        assert "dropout draws other elements" in note

    def test_a_store_that_moved_or_was_renamed_is_the_same(self, saved, tmp_path, stores):
        shutil.copytree(stores / "a", moved := tmp_path / "moved")
        assert preflight(with_data(saved, [moved]))
        heavier = dataclasses.replace(saved.data.train[0], weight=3.0)
        with pytest.raises(CheckpointError, match=r"allow_changes=\[data\.train\]"):
            preflight(with_group(saved, "data", train=(heavier,)))

    def test_changes_of_the_trajectory_must_be_allowed(self, saved):
        other = with_group(saved, "optimizer", lr=0.5)
        with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.0003 -> 0\.5\n.*allow_changes=\[optimizer\.lr\]"):
            preflight(other)
        assert preflight(with_group(other, "checkpoint", allow_changes=("optimizer.lr",)))

    def test_another_model_is_refused(self, saved):
        other = with_group(saved, "model", num_layers=5)
        for allowed in ((), ("model",)):
            with pytest.raises(CheckpointError, match=r"another model:\n  model\.num_layers: 4 -> 5"):
                preflight(with_group(other, "checkpoint", allow_changes=allowed))

    def test_never_and_another_run_look_at_nothing(self, saved, tmp_path):
        other = with_group(saved, "model", num_layers=5)
        assert preflight(with_group(other, "checkpoint", resume="never"))
        assert preflight(dataclasses.replace(other, run_dir=str(tmp_path / "another")))

    def test_a_path_is_looked_at(self, saved, tmp_path):
        other = dataclasses.replace(saved, run_dir=str(tmp_path / "another"), seed=5)
        from_path = with_group(other, "checkpoint", resume=f"{saved.run_dir}/checkpoints/step_00000010")
        with pytest.raises(CheckpointError, match="seed: 1234 -> 5"):
            preflight(from_path)
        with pytest.raises(CheckpointError, match="gone is not a checkpoint: it has no manifest"):
            preflight(with_group(saved, "checkpoint", resume=str(tmp_path / "gone")))

    def test_the_newest_counts(self, saved):
        save(dataclasses.replace(saved, seed=7), 20)
        with pytest.raises(CheckpointError, match="seed: 7 -> 1234"):
            preflight(saved)
        assert preflight(saved, is_alone=False), "another host may hold a newer one"

    def test_a_damaged_newest_is_left_to_the_ranks_but_not_a_path(self, saved, tmp_path):
        folder = save(dataclasses.replace(saved, seed=7), 20)
        (folder / "manifest.json").write_text("{")
        assert preflight(saved)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            preflight(with_group(saved, "checkpoint", resume=str(folder)))

    def test_weights_may_change_from_where_the_run_stands(self, saved):
        """32 sequences a step: the checkpoint of step 10 stands at sample 320."""
        changes = (WeightsConfig(step=4, weights=(2.0,)), WeightsConfig(step=10, weights=(3.0,)))
        saved = with_group(saved, "model", vocab_size=200)
        planned = with_group(saved, "data", schedule=changes)
        manifest = read_manifest(save(planned, 10, samples_consumed=320))
        assert check_resume(planned, manifest) == []
        for later in (
            (),
            (WeightsConfig(step=10, weights=(4.0,)),),
            (*changes[1:], WeightsConfig(step=99, weights=(1.0,))),
        ):
            (note,) = check_resume(with_group(saved, "data", schedule=(changes[0], *later)), manifest)
            assert note.startswith("data.schedule: ")
            assert note.endswith("from where the run stands")
        for past in (
            (),
            changes[1:],
            (WeightsConfig(step=5, weights=(2.0,)),),
            (WeightsConfig(step=4, weights=(1.0,)),),
        ):
            with pytest.raises(CheckpointError, match="off its trajectory"):
                check_resume(with_group(saved, "data", schedule=past), manifest)
        # With another batch size the same steps are other samples.
        halved = with_group(planned, "trainer", global_batch_size=16)
        halved = with_group(halved, "checkpoint", allow_changes=("trainer.global_batch_size",))
        for schedule in (changes, (*changes, WeightsConfig(step=99, weights=(1.0,)))):
            with pytest.raises(CheckpointError, match=r"data\.schedule: .*\[128\]|data\.schedule: .* -> "):
                check_resume(with_group(halved, "data", schedule=schedule), manifest)
        assert check_resume(with_group(halved, "checkpoint", allow_changes=("trainer", "data.schedule")), manifest)
        doubled = (WeightsConfig(step=8, weights=(2.0,)), WeightsConfig(step=20, weights=(3.0,)))
        assert len(check_resume(with_group(halved, "data", schedule=doubled), manifest)) == 3


def save(config, step, samples_consumed=0):
    """A checkpoint without tensors."""
    values = config_values(with_group(config, "model", vocab_size=200))
    manifest = Manifest(
        step=step,
        samples_consumed=samples_consumed,
        tokens_seen=0,
        skipped_steps=0,
        skipped_in_a_row=0,
        optimizer_step=step,
        loss_scaler={},
        seed=config.seed,
        config=json.loads(json.dumps(values)),
        stores=[TokenStore.open(store.path).digest for store in config.data.train],
        topology={},
        versions={},
        files=[],
    )
    return commit(create_temporary(Path(config.run_dir) / "checkpoints", step), manifest)
