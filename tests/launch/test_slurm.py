"""What is handed to Slurm: the script, and what the commands of Slurm are asked; a real one is in tests/cluster."""

import dataclasses
import os
import secrets
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from megalite.config.compose import compose_train
from megalite.config.frozen import FROZEN, config_to_send, config_yaml, encoded_config, sent_config
from megalite.config.place import own_job
from megalite.config.validate import resolve_auto, validate_train
from megalite.config.validate_launch import time_limit
from megalite.errors import ConfigError, DataError, ResourceError
from megalite.launch.cli import main
from megalite.launch.launchers import LAUNCHERS
from megalite.launch.prepare import Training, prepare, world_of
from megalite.launch.slurm import job as slurm_job
from megalite.launch.slurm.job import srun_command
from megalite.launch.slurm.submit import command, job_record, script_of, start_slurm
from tests.runs import VOCAB, write_store

CONF = Path(__file__).parents[2] / "conf/launch"
TINY = ("data.train=a store", "run_name=tiny", "run_dir=outputs/a run", "model.vocab_size=300",
        "trainer.global_batch_size=16", "trainer.micro_batch_size=1")  # fmt: skip


def training(*overrides: str) -> Training:
    config = compose_train([*TINY, *overrides])
    world_size, device = world_of(config.launch)
    validate_train(config, world_size, device)
    return Training(resolve_auto(config, device, world_size), world_size, device)


def options(script: str) -> list[str]:
    """What `#SBATCH` lines ask for, as sbatch reads them."""
    return [word for line in script.splitlines() if line.startswith("#SBATCH ") for word in shlex.split(line[8:])]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_launcher_composes_and_is_described(name):
    found = training(f"launch={name}")
    assert found.config.launch.name == name
    assert set(LAUNCHERS) == {path.stem for path in CONF.glob("*.yaml")}
    assert LAUNCHERS[name][0](found)


def test_a_script_asks_for_what_the_configuration_says():
    asked = (
        "launch=slurm", "launch.nodes=2", "launch.slurm.gpus_per_node=4", "launch.slurm.cpus_per_task=16",
        "launch.slurm.partition=gpu", "launch.slurm.account=lab", "launch.slurm.qos=high", "launch.slurm.time=1-12",
        "launch.slurm.constraint=\"a100&ib\"", "launch.slurm.memory=64G", "launch.slurm.exclusive=true",
        "launch.slurm.after=[17,18]", "launch.slurm.options=['--reservation=night']", "launch.slurm.modules=[cuda/13]",
        "launch.slurm.setup=['source env/bin/activate']", "launch.environment={NCCL_DEBUG:INFO}",
    )  # fmt: skip
    found = training(*asked)
    assert (found.world_size, found.device, found.config.engine.precision) == (8, "cuda", "bf16")
    script = script_of(found)
    assert options(script) == [
        "--job-name=tiny", "--nodes=2", "--ntasks-per-node=1", "--partition=gpu", "--account=lab", "--qos=high",
        "--constraint=a100&ib", "--time=1-12", "--gpus-per-node=4", "--cpus-per-task=16", "--mem=64G", "--exclusive",
        "--dependency=afterok:17:18", "--kill-on-invalid-dep=yes",
        f"--output={Path('outputs/a run').absolute()}/logs/slurm_%j.log", "--open-mode=append", "--requeue",
        "--signal=B:USR1@120", "--reservation=night",
    ]  # fmt: skip
    lines = script.splitlines()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    order = [lines.index(line) for line in ("module load cuda/13", "source env/bin/activate", "export NCCL_DEBUG=INFO")]
    assert order == sorted(order)


def test_no_time_limit_is_one_too():
    assert "--time=UNLIMITED" in options(script_of(training("launch=slurm", "launch.slurm.time=UNLIMITED")))


def test_what_a_job_is_not_asked_for_it_does_not_get():
    asked = options(script_of(training("launch=slurm", "launch.nproc_per_node=1", "launch.slurm.requeue=false")))
    assert "--no-requeue" in asked
    assert "--requeue" not in asked
    quiet = options(script_of(training("launch=slurm", "launch.nproc_per_node=1", "launch.slurm.signal_seconds=0")))
    assert not [option for option in quiet if option.startswith("--signal")]


def test_one_task_a_rank_in_a_container():
    found = training(
        "launch=slurm", "launch.nproc_per_node=4", "launch.slurm.tasks=rank", "launch.slurm.container=lab/megalite:1",
        "launch.slurm.mounts=['/data:/data','/scratch:/scratch']", "launch.slurm.cpus_per_task=2",
    )  # fmt: skip
    assert "--ntasks-per-node=4" in options(script_of(found))
    words = srun_command(found.config)
    assert words[-3:] == ["python", "-m", "megalite.train"], "the container's own Python"
    asked = {
        "--ntasks=4",
        "--cpus-per-task=2",
        "--container-image=lab/megalite:1",
        f"--container-workdir={os.getcwd()}",
    }
    assert asked | {"--container-mounts=/data:/data,/scratch:/scratch"} <= set(words)


def test_the_configuration_travels_in_the_script_and_arrives_as_it_was(tmp_path):
    """Bash runs all of it but for the driver at its end; whatever a value holds, it is text."""
    config = training("launch=slurm", "launch.nproc_per_node=2", "data.train='a $HOME `id` \"store\" EOF'")
    script = script_of(config)
    lines = script.splitlines()
    assert lines[-1].endswith("-m megalite.launch.slurm.job")
    probe = tmp_path / "probe.sh"
    probe.write_text("\n".join([*lines[:-1], f'printf %s "${FROZEN}"']))
    text = subprocess.run(["bash", probe], capture_output=True, text=True, check=True).stdout
    assert sent_config({FROZEN: text}) == config.config
    word = encoded_config(config.config)
    assert len(word) < len(config_yaml(config.config)), "compressed"
    assert shlex.quote(word.replace(":", "").replace("=", "")) == word.replace(":", "").replace("=", "")
    assert sent_config({FROZEN: word}) == config.config


def test_a_configuration_of_thousands_of_stores_reaches_the_ranks():
    """Linux gives a process no variable of more than 128 KiB."""
    config = training("launch=slurm", "launch.nproc_per_node=2").config
    assert config_to_send(config) == config_yaml(config), "plain, for who reads a batch script"
    # Paths differ in one number, as those of a corpus in parts do.
    stores = tuple(dataclasses.replace(config.data.train[0], path=f"/data/corpus/{i:04d}/train") for i in range(4000))
    large = dataclasses.replace(config, data=dataclasses.replace(config.data, train=stores))
    assert len(config_yaml(large)) > 128 << 10
    text = config_to_send(large)
    done = subprocess.run(["sh", "-c", f'printf %s "${FROZEN}"'], env={FROZEN: text}, capture_output=True, text=True)
    assert sent_config({FROZEN: done.stdout}) == large
    names = [secrets.token_hex(40) for _ in range(4000)]
    noise = tuple(dataclasses.replace(store, path=name) for store, name in zip(stores, names, strict=True))
    with pytest.raises(ConfigError, match=r"the configuration takes \d+ bytes, compressed, .* at most 130816 .*merge"):
        config_to_send(dataclasses.replace(config, data=dataclasses.replace(config.data, train=noise)))


def test_a_run_directory_that_cannot_be_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"run_dir: nothing can be written in .*file/run: .*Not a directory"):
        start_slurm(training("launch=slurm", "launch.nproc_per_node=2", f"run_dir={tmp_path}/file/run"))


@pytest.mark.parametrize("text", ["zlib+base64:", "zlib+base64:eJw", "zlib+base64:c2VlZA==", "zlib+base64:é"])
def test_a_damaged_configuration_in_the_environment_is_named(text):
    with pytest.raises(ConfigError, match="the environment variable MEGALITE_CONFIG is damaged"):
        sent_config({FROZEN: text})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch=torchrun launch.address=x", r"launch.address: found 'x', which launch.nodes=1 has no use for"),
        ("launch=torchrun launch.interface=ib0", r"launch.interface: found 'ib0', which launch.nodes=1 has no use for"),
        ("launch.environment={RANK:5}", r"launch.environment.RANK: is for the launcher to set"),
        ("launch.environment={MEGALITE_CONFIG:x}", r"launch.environment.MEGALITE_CONFIG: is for the launcher to set"),
        ("launch.nodes=2", r"launch.nodes: found 2, which launch=local has no use for; it is for launch=torchrun"),
        ("launch.slurm.partition=gpu", r"launch.slurm: found values, which launch=local has no use for"),
        ("launch.wait=true", "launch.wait: found True, which launch=local"),
        ("launch.nproc_per_node=0", "launch.nproc_per_node: found 0, must be at least 1"),
        ("launch.restarts=-1", "launch.restarts: found -1"),
        ("launch.grace=0", "launch.grace: found 0.0, must be above 0 seconds"),
        ("launch.environment={WANDB_API_KEY:x}", "launch.environment.WANDB_API_KEY: would be written to the run dir"),
        ("launch.environment={a-b:x}", "'a-b' is no name of a variable"),
        (
            "launch.environment={A:true}",
            "launch.environment.A: found True, expected text on one line",
        ),
        ("launch.environment={A:1.10}", "launch.environment.A: found 1.1, expected text"),
        ("launch=slurm launch.slurm.time=soon", "launch.slurm.time: found 'soon', expected minutes"),
        ("launch=slurm launch.slurm.time=2", "launch.slurm.signal_seconds: found 120, but launch.slurm.time=2 ends"),
        ("launch=slurm launch.slurm.after=[abc]", "launch.slurm.after: found 'abc', expected the number of a job"),
        ("launch=slurm launch.slurm.options=[night]", "launch.slurm.options: found 'night', expected an option"),
        ("launch=slurm launch.slurm.partition='a;b'", "which holds a character that a shell would act on"),
        ("launch=slurm launch.slurm.mounts=[/a:/b]", "launch.slurm.mounts: needs launch.slurm.container"),
        ("launch=torchrun launch.nodes=2", "launch.address: is null"),
        ("launch=deepspeed launch.nodes=2", "launch.hostfile: is null"),
        ("launch=torchrun launch.port=80", "launch.port: found 80, must lie between 1024 and 65534"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        training(*override.split(" ", 1))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 180), ("3:30", 210), ("1:00:00", 3600), ("2-0", 172800), ("1-12:30", 131400), ("0-0:0:5", 5), ("x", None)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text, seconds):
    assert time_limit(text) == seconds


def test_a_store_that_another_job_is_to_make_is_looked_at_when_that_has_ended(tmp_path, caplog, capfd):
    store = tmp_path / "store"
    keys = [f"data.train={store}", "data.sequence_length=32", "launch=slurm", "launch.nproc_per_node=1"]
    config = compose_train([*keys, "launch.slurm.after=[7]"])
    with caplog.at_level("INFO"):
        assert prepare(config).config.model.vocab_size is None
    assert f"data: {store}: not there yet; looked at when job 7 has ended well" in caplog.text
    assert main(["train", *keys, "launch.slurm.after=[7]", "launch.dry_run=true"]) == 0
    assert "vocabulary is that of data.train once the jobs of launch.slurm.after have ended" in capfd.readouterr().out
    with pytest.raises(DataError, match=f"data.train: {store} is not a token store"):
        prepare(compose_train(keys))
    write_store(store)
    assert prepare(compose_train(keys)).config.model.vocab_size == VOCAB
    assert prepare(config).config.model.vocab_size is None, "job 7 may put another in its place"
    with pytest.raises(ConfigError, match=r"model.vocab_size: found 5"):
        prepare(compose_train([*keys, "launch.slurm.after=[7]", "model.vocab_size=5"]))


def test_a_build_that_is_waited_for_says_which_part_failed_and_why(tmp_path, monkeypatch, capfd):
    """What comes after it is only cancelled."""
    log = tmp_path / "out.slurm/part_1.log"
    log.parent.mkdir()
    log.with_name("part_0.log").write_text("DataError: of a build before\n")
    log.write_text("DataError: of a build before, too\n")
    submit = f'#!/bin/sh\necho "DataError: b.jsonl, line 2: no JSON" >> {log}; echo 3\n'
    (tmp_path / "sbatch").write_text(submit)
    (tmp_path / "sbatch").chmod(0o755)
    fake_scontrol(tmp_path, monkeypatch, "JobId=3 JobState=CANCELLED ExitCode=0:0")
    keys = [f"output={tmp_path}/out", "launch=slurm", "parts=2", "launch.wait=true", "launch.slurm.after=[7]"]
    assert main(["data", "build", "input=x", "tokenizer.path=y", *keys]) == 1
    assert f"{log}: DataError: b.jsonl, line 2: no JSON" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["launch.dry_run=true"], "launch.dry_run: found True, which a build has no use for"),
        (["launch.restarts=5"], "launch.restarts: found 5, which a build has no use for"),
        (["launch=slurm", "output='a\"b'"], "in a batch script a path holds no quotes"),
        (["launch=slurm", "launch.slurm.time=14400"], "launch.slurm.time: found 14400, which are minutes: write a day"),
        (["launch=slurm", "launch.slurm.tasks=rank"], "launch.slurm.tasks: found 'rank', which a build has no use for"),
    ],
)
def test_what_a_build_cannot_be_told_is_said(keys, message, capsys):
    assert main(["data", "build", "input=x", "output=y", "tokenizer.path=z", *keys]) == 2
    assert message in capsys.readouterr().err


def test_a_build_may_have_a_shorter_limit_than_a_training_has_to_save(tmp_path, capsys):
    keys = [f"output={tmp_path}/out", "launch=slurm", "launch.slurm.time=1", "launch.slurm.after=[7]"]
    assert main(["data", "build", "input=x", "tokenizer.path=y", *keys, "launch.dry_run=true"]) == 0
    assert "--signal" not in capsys.readouterr().out


RECORD = "JobId=7 JobName=run JobState={} Restarts={} ExitCode=0:0 PreemptTime={}"


@pytest.mark.parametrize(
    ("state", "restarts", "is_asked"), [("RUNNING", 1, True), ("RUNNING", 2, False), ("PENDING", 2, False)]
)
def test_a_driver_requeues_its_own_life_of_the_job_alone(state, restarts, is_asked, tmp_path, monkeypatch):
    """One whose host was cut off may hear late that Slurm has the job at work elsewhere."""
    fake_scontrol(tmp_path, monkeypatch, RECORD.format(state, restarts, "None"))
    slurm_job._requeue("7", 1)
    assert (tmp_path / "asked").exists() == is_asked
    assert not is_asked or (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("time", "preempted"), [("None", False), ("2026-11-30T20:00:00", True)])
def test_a_job_that_makes_room_for_another_is_known(time, preempted, tmp_path, monkeypatch):
    fake_scontrol(tmp_path, monkeypatch, RECORD.format("RUNNING", 0, time))
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    stop = slurm_job._Stop("7")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.received, stop.by_slurm) == ([signal.SIGTERM], False)
        assert stop.is_preempted() == preempted
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_of_an_array_the_record_of_the_job_itself_is_read(tmp_path, monkeypatch):
    others = RECORD.replace("JobId=7", "JobId=5").format("COMPLETED", 3, "None")
    fake_scontrol(tmp_path, monkeypatch, others, RECORD.format("RUNNING", 1, "None"))
    assert job_record("7")["Restarts"] == "1"
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert own_job() == "7_2", "by its number all tasks of the array would be meant"
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert own_job() == "7"


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"])
def test_the_command_that_starts_ranks_is_not_started_once_for_each(name, monkeypatch, capsys):
    """Each would train alone, or find the others in its run directory."""
    monkeypatch.setenv(name, "4")
    assert main(["train", "data.train=store"]) == 2
    assert "give them `python -m megalite.train` with the same keys" in capsys.readouterr().err


def test_what_a_command_of_slurm_says_is_the_message(tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ResourceError, match="sbatch: sbatch: error: invalid partition specified: gpu"):
        command("sbatch")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no scontrol on this host"):
        command("scontrol")


def fake_scontrol(folder, monkeypatch, *records):
    """What it shows stands in a file; what else it is asked for in another."""
    (folder / "shown").write_text("\n".join(records) + "\n")
    script = f'#!/bin/sh\n[ "$2" = show ] && exec cat {folder}/shown\necho "$@" >> {folder}/asked\n'
    (folder / "scontrol").write_text(script)
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_build_is_an_array_of_its_parts_and_a_job_that_waits_for_them(tmp_path, monkeypatch, capfd):
    """sbatch and the jobs are made up; that they run to one store is tested with a real Slurm."""
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$0.log"; wc -l < "$0.log"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    keys = [
        "input=my books/*.txt", f"output={tmp_path}/out", "tokenizer.path=tokenizer", "launch=slurm", "parts=3",
        "launch.slurm.partition=cpu", "launch.slurm.cpus_per_task=8", "launch.slurm.after=[7]",
    ]  # fmt: skip
    assert main(["data", "build", *keys]) == 0
    assert "launch.slurm.after=[2]" in capfd.readouterr().out
    assert main(["data", "build", *keys[:-1]]) == 3, "it waits for no job that could still make the tokenizer"
    assert "tokenizer" in capfd.readouterr().err
    folder = tmp_path / "out.slurm"
    fake_scontrol(tmp_path, monkeypatch, "JobId=1 JobState=PENDING ExitCode=0:0")
    assert main(["data", "build", *keys]) == 5
    assert f"output: job 1 of {folder} is PENDING; `scancel 1 2` ends it" in capfd.readouterr().err
    first, second = (tmp_path / "sbatch.log").read_text().splitlines()
    assert first == f"--parsable --dependency=afterok:7 --kill-on-invalid-dep=yes {folder}/parts.sbatch"
    assert second == f"--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes {folder}/build.sbatch"
    parts, whole = (folder / "parts.sbatch").read_text(), (folder / "build.sbatch").read_text()
    assert {"--array=0-2", "--partition=cpu", "--cpus-per-task=8", "--nodes=1"} <= set(options(parts))
    assert not [option for option in options(parts + whole) if "dependency" in option or "signal" in option]
    for script, more in ((parts, ["part=[2,3]"]), (whole, [])):
        line = script.splitlines()[-1].replace("$SLURM_ARRAY_TASK_ID", "2")
        words = shlex.split(line)
        assert words[2:] == ["-m", "megalite.launch.cli", "data", "build", *keys[:3], *more]
