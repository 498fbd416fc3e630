"""R13: what a user may get wrong in `megalite train` ends before any process starts, in one sentence with the key.

Every row goes through the command itself, as typed. Choices and ranges key by key are in tests/config.
"""

import json

import pytest

from megalite.guard.lock import RunLock
from megalite.launch.cli import main
from tests.runs import write_store

TP = ["launch.nproc_per_node=4"]
# What is typed besides data.train and run_dir, the exit code, what the message must say.
ROWS = {
    "heads do not divide": (["parallel.tensor=3", "launch.nproc_per_node=3"], 2, ["parallel.tensor", "allowed"]),
    "kv heads do not divide": (
        ["model=llama_8b", "model.vocab_size=300", "model.num_key_value_heads=2", "parallel.tensor=4", *TP],
        2,
        ["parallel.tensor", "num_key_value_heads"],
    ),
    "hidden size by heads": (["model.hidden_size=130"], 2, ["model.hidden_size", "num_attention_heads"]),
    "odd rotary": (["model.positions=rotary", "model.head_size=33"], 2, ["head_size", "even"]),
    "ffn does not divide": (["model.ffn_hidden_size=510", "parallel.tensor=4", *TP], 2, ["ffn_hidden_size=510"]),
    "world and tensor": (["parallel.tensor=2", "launch.nproc_per_node=3"], 2, ["parallel.tensor", "3"]),
    "batch triple": (
        ["trainer.global_batch_size=30", "trainer.micro_batch_size=4"],
        2,
        ["trainer.global_batch_size", "30", "28", "32"],
    ),
    "bf16 without zero": (["engine.precision=bf16", "engine.zero_stage=0"], 2, ["engine.precision", "zero_stage"]),
    "fp16 on a CPU": (["engine.precision=fp64"], 2, ["engine.precision", "fp16"]),
    "sequence beyond the table": (["data.sequence_length=4096"], 2, ["data.sequence_length", "max_sequence_length"]),
    "sequence beyond the store": (
        ["model.max_sequence_length=8192", "data.sequence_length=8192"],
        2,
        ["data.sequence_length", "holds only"],
    ),
    "vocabulary below the store's": (["model.vocab_size=100"], 2, ["model.vocab_size", "300"]),
    "warm-up beyond the end": (["trainer.steps=5", "schedule.warmup_steps=9"], 2, ["schedule.warmup_steps", "5"]),
    "no steps": (["trainer.steps=0"], 2, ["trainer.steps"]),
    "stop beyond the end": (["trainer.steps=5", "trainer.stop_after=9"], 2, ["trainer.stop_after"]),
    "rate of zero": (["optimizer.lr=0"], 2, ["optimizer.lr", "above 0"]),
    "rate that is no number": (["optimizer.lr=nan"], 2, ["optimizer.lr"]),
    "rate in words": (["optimizer.lr=fast"], 2, ["optimizer.lr", "a number"]),
    "beta of one": (["optimizer.betas=[0.9,1.0]"], 2, ["optimizer.betas"]),
    "one beta": (["optimizer.betas=[0.9]"], 2, ["optimizer.betas", "2 values"]),
    "unknown schedule": (["schedule.name=cosin"], 2, ["schedule.name", "Did you mean cosine"]),
    "unknown schedule by name": (["schedule=cosin"], 2, ["schedule", "cosine"]),
    "unknown model by name": (["model=gpt5"], 2, ["model", "gpt2_124m"]),
    "smoothing of one": (["objective.label_smoothing=1"], 2, ["objective.label_smoothing"]),
    "negative z-loss": (["objective.z_loss=-1"], 2, ["objective.z_loss"]),
    "dropout of one": (["model.dropout=1.0"], 2, ["model.dropout"]),
    "saving never": (["checkpoint.save_every=-1"], 2, ["checkpoint.save_every"]),
    "keeping none": (["checkpoint.keep=0"], 2, ["checkpoint.keep", "at least 1"]),
    "the best of nothing": (["checkpoint.keep_best=true"], 2, ["checkpoint.keep_best", "data.validation"]),
    "an unknown policy": (["checkpoint.on_save_error=ignore"], 2, ["on_save_error", "continue, retry, stop"]),
    "steps the wrong way round": (["data.skip_steps=[[9,3]]"], 2, ["data.skip_steps", "[9, 3]"]),
    "a skipped document that is none": (["data.skip_documents=[words:999]"], 2, ["data.skip_documents", "0 to 59"]),
    "a typing error": (["trainer.stepz=5"], 2, ["trainer.stepz", "Did you mean trainer.steps"]),
    "a key of no group": (["trainr.steps=5"], 2, ["trainr", "Did you mean trainer"]),
    "an added key": (["+trainer.foo=1"], 2, ["trainer.foo"]),
    "an added group": (["+foo=1"], 2, ["foo"]),
    "a removed key": (["~data.train"], 2, ["data.train", "nor deleted"]),
    "something missing": (["data.train=???"], 2, ["data.train", "required"]),
    "a cycle": (["run_name=${run_dir}", "run_dir=${run_name}"], 2, ["run_"]),
    "an interpolation of nothing": (["run_name=${no.such.key}"], 2, ["no"]),
    "text for a number": (["trainer.steps=many"], 2, ["trainer.steps", "whole number"]),
    "a fraction for a number": (["trainer.steps=1.5"], 2, ["trainer.steps", "whole number"]),
    "yes for true": (["engine.compile=maybe"], 2, ["engine.compile", "true or false"]),
    "one for true": (["engine.compile=1"], 2, ["engine.compile", "true or false"]),
    "a value without a key": (["5"], 2, ["5"]),
    "a dash": (["--steps=5"], 2, ["--steps"]),
    "an unknown DeepSpeed key": (["engine.ds_overrides={zero_optimisation:{stage:2}}"], 2, ["zero_optimisation"]),
    "a DeepSpeed key that is ours": (["engine.ds_overrides={train_batch_size:7}"], 2, ["train_batch_size"]),
    "processes of none": (["launch.nproc_per_node=0"], 2, ["launch.nproc_per_node"]),
    "a name with a path": (["run_name=../../etc"], 2, ["run_name", "letters"]),
    "a name of 300 letters": ([f"run_name={'x' * 300}"], 2, ["run_name", "200"]),
    "a seed below zero": (["seed=-1"], 2, ["seed"]),
    "weights that are none": (["data.train=[{path:STORE,weight:-1}]"], 2, ["data.train", "weight"]),
    "a store that is not there": (["data.train=nowhere"], 3, ["data.train", "nowhere"]),
    "a store that is no store": (["data.train=EMPTY"], 3, ["data.train"]),
    "validation that is not there": (["data.validation=nowhere"], 3, ["data.validation", "nowhere"]),
    "a packing that was not made": (["data.packing=best_fit"], 3, ["megalite data pack"]),
    "a checkpoint that is not there": (["checkpoint.resume=nowhere"], 4, ["nowhere", "manifest"]),
    "a key that may not change": (["checkpoint.allow_changes=[modle]"], 2, ["checkpoint.allow_changes", "modle"]),
    "a secret in a path": (["data.train=s3://me:secret@bucket/x"], 2, ["data.train", "user or password"]),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("stores") / "words")


def run(arguments, store, folder, capsys):
    (folder / "empty").mkdir()
    typed = [text.replace("STORE", str(store)).replace("EMPTY", str(folder / "empty")) for text in arguments]
    given = {text.partition("=")[0] for text in typed}
    defaults = {"data.train": store, "run_dir": folder / "run", "data.sequence_length": 32}
    code = main(["train", *(f"{key}={value}" for key, value in defaults.items() if key not in given), *typed])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_command(row, store, tmp_path, capsys, monkeypatch):
    arguments, code, phrases = ROWS[row]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megalite.launch.launchers.spawn_ranks", lambda *args: pytest.fail("ranks were started"))
    monkeypatch.setattr("megalite.train.train", lambda *args: pytest.fail("training was started"))
    found, message = run(arguments, store, tmp_path, capsys)
    assert found == code, message
    for phrase in phrases:
        assert phrase in message
    assert "Traceback" not in message
    assert "secret" not in message
    assert len(message.splitlines()) <= 24, "more than a screen"
    assert not (tmp_path / "run").exists()


HOSTILE_TARGETS = ["os.system", "builtins.open", "builtins.eval", "shutil.copyfile", "urllib.request.urlopen",
                   "pathlib.Path.unlink", "asyncio.create_subprocess_shell", "multiprocessing.Process", "torch.load",
                   "subprocess.Popen", "pickle.loads", "ctypes.CDLL", "runpy.run_path"]  # fmt: skip
PLACES = ["", "model.", "optimizer.", "data.", "logging.wandb."]


@pytest.mark.parametrize("place", PLACES)
def test_a_configuration_never_runs_code(place, store, tmp_path, capsys, monkeypatch):
    """S2: there is no `_target_`: with thirteen of them in five places, and in a checkpoint's own configuration."""
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    for number, target in enumerate(HOSTILE_TARGETS):
        for prefix in ("", "+", "++"):
            typed = [f"{prefix}{place}_target_={target}", f"{prefix}{place}_args_=[{canary}]"]
            folder = tmp_path / f"{number}{prefix}"
            folder.mkdir()
            code, message = run(typed, store, folder, capsys)
            assert code == 2, message
            assert "_target_" in message or "_args_" in message
    assert not canary.exists()


def test_a_run_directory_in_use(store, tmp_path, capsys):
    lock = RunLock(tmp_path / "run")
    try:
        code, message = run(["trainer.steps=1"], store, tmp_path, capsys)
    finally:
        lock.close()
    assert code == 5
    assert "run_dir" in message
    assert "in use" in message
    assert json.dumps(str(tmp_path / "run"))[1:-1] in message
