import pytest

from megalite.config.changes import REFUSED, check_changes
from megalite.config.compose import SAFE, compose_train, flatten
from megalite.config.schema import TrainConfig
from megalite.errors import CheckpointError
from tests.config.keys import leaf_keys

SAVED = {
    "run_name": "x",
    "seed": 1,
    "model": {"num_layers": 2, "dropout": 0.0, "rotary_scaling": None},
    "trainer": {"steps": 10, "log_every": 1},
    "parallel": {"tensor": 1},
    "optimizer": {"lr": 0.1, "betas": [0.9, 0.95]},
    "data": {"train": [{"path": "a"}], "validation": []},
    "logging": {"wandb": {"mode": "disabled"}},
}


def changed(key, value):
    name, _, rest = key.partition(".")
    return SAVED | {name: SAVED[name] | {rest: value} if rest else value}


def test_nothing_changed():
    assert check_changes(SAVED, SAVED, ()) == []


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("parallel.tensor", 2, "parallel.tensor: 1 -> 2"),
        ("trainer.log_every", 5, "trainer.log_every: 1 -> 5"),
        ("logging", {"wandb": {"mode": "offline"}}, "logging.wandb.mode: disabled -> offline"),
        ("data.validation", [{"path": "v"}], "data.validation: [] -> [{'path': 'v'}]"),
    ],
)
def test_safe_changes_are_noted(key, value, note):
    assert check_changes(SAVED, changed(key, value), ()) == [f"{note} (safe)"]


def test_with_dropout_another_layout_is_said_to_draw_other_elements():
    saved = changed("model.dropout", 0.1)
    for key, value, words in [
        ("tensor", 2, "safe, but dropout draws other elements"),
        ("log_every", 5, "safe"),
    ]:
        group = "parallel" if key == "tensor" else "trainer"
        (note,) = check_changes(saved, saved | {group: saved[group] | {key: value}}, ())
        assert note.endswith(f" ({words})")


def test_a_safe_change_leaves_the_name_of_a_run_alone():
    """Or the command with the change would begin another run."""
    name = compose_train(["data.train=store"]).run_name
    changes = [
        "parallel.tensor=2", "engine.zero_stage=2", "engine.recompute=full", "engine.compile=true", "guard.timeout=9",
        "trainer.log_every=2", "trainer.stop_after=3", "trainer.micro_batch_size=2", "data.skip_steps=[[3,3]]",
        "data.skip_documents=[a:1]", "data.validation=other", "data.prefetch=0", "logging.tensorboard=true",
        "checkpoint.keep=4", "launch.nproc_per_node=2", "trainer.eval_every=7", "trainer.max_skipped_steps=9",
        "engine.offload=optimizer",
    ]  # fmt: skip
    assert {compose_train(["data.train=store", change]).run_name for change in changes} == {name}
    assert {key for key in SAFE if key.startswith(("run_", "wandb"))} == {"run_name", "run_dir"}
    covered = {change.partition("=")[0] for change in changes}
    assert all(key.startswith("run_") or any(c.startswith(key) for c in covered) for key in SAFE)
    assert compose_train(["data.train=store", "seed=5"]).run_name != name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", 2), ("trainer.steps", 20), ("optimizer.lr", 0.2), ("optimizer.betas", [0.9, 0.99])),
        *(("model.dropout", 0.1), ("data.train", [{"path": "b"}])),
    ],
)
def test_what_changes_the_trajectory_must_be_asked_for(key, value):
    with pytest.raises(CheckpointError) as error:
        check_changes(SAVED, changed(key, value), ())
    message = str(error.value)
    assert f"\n  {key}: " in message
    assert f"checkpoint.allow_changes=[{key}]" in message
    assert "run_name" in message
    for allowed in (key, key.partition(".")[0]):
        (note,) = check_changes(SAVED, changed(key, value), (allowed,))
        assert note.endswith(" (allowed: it changes the trajectory)")
    with pytest.raises(CheckpointError):
        check_changes(SAVED, changed(key, value), (key[:-1], key + "x", "run_dir"))


def test_several_are_told_at_once():
    new = changed("seed", 2) | {"optimizer": {"lr": 0.2, "betas": [0.9, 0.95]}}
    with pytest.raises(
        CheckpointError, match=r"seed: 1 -> 2\n.*allow_changes=\[optimizer\.lr,seed\]|lr: 0\.1 -> 0\.2\n"
    ):
        check_changes(SAVED, new, ())
    notes = check_changes(SAVED, new, ("seed", "optimizer.lr"))
    assert [note.partition(" (")[0] for note in notes] == ["optimizer.lr: 0.1 -> 0.2", "seed: 1 -> 2"]


@pytest.mark.parametrize("allowed", [(), ("model",), ("model.num_layers",)])
def test_another_model_is_refused_whatever_is_allowed(allowed):
    with pytest.raises(CheckpointError, match=r"belongs to another model:\n  model\.num_layers: 2 -> 3"):
        check_changes(SAVED, changed("model.num_layers", 3), allowed)


def test_keys_that_only_one_of_the_two_has():
    with pytest.raises(CheckpointError, match=r"model\.rotary_scaling\.factor: None -> 8\.0"):
        check_changes(SAVED, changed("model.rotary_scaling", {"factor": 8.0}), ())
    with pytest.raises(CheckpointError, match=r"new: None -> 1"):
        check_changes(SAVED, SAVED | {"new": 1}, ())


def test_lists_of_keys_name_keys():
    keys = leaf_keys(TrainConfig)
    for key in (*SAFE, *REFUSED):
        assert any(name == key or name.startswith(f"{key}.") for name in keys), key


def test_flatten_keeps_empty_groups_and_lists():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 2}]}) == {"a.b.c": 1, "a.d": {}, "e": [{"f": 2}]}
