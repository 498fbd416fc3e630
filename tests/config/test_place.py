import pytest

from megalite.config.place import (
    Place,
    count_gpus,
    drop_local_rank,
    first_host,
    place_from_environment,
    port_of_job,
)
from megalite.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_without_a_launcher():
    assert place_from_environment({"PATH": "x"}) == Place(0, 0, 1, 1, None)


def test_under_torchrun_and_under_deepspeed():
    assert place_from_environment(TORCHRUN) == Place(3, 1, 4, 2, "env://", "localhost", 29500)
    without = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert place_from_environment(without) == Place(3, 1, 4, 4, "env://", "localhost", 29500)


SRUN = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "6001",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-08,11],login",
}  # fmt: skip


def test_under_srun_a_task_a_rank():
    assert place_from_environment(SRUN) == Place(3, 1, 5, 2, "tcp://gpu07:20002", "gpu07", 20002)
    given = SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "29400", "SLURM_NODEID": "2"}
    assert place_from_environment(given) == Place(3, 1, 5, 1, "tcp://head:29400", "head", 29400)
    assert place_from_environment(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == Place(), "a batch script"
    without = {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}
    with pytest.raises(ConfigError, match="sets SLURM_STEP_NUM_TASKS but not SLURM_LOCALID"):
        place_from_environment(without)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a,b[1-2]", "a"), ("gpu[03-05,9],x", "gpu03"), ("n[7]", "n7"), ("rack[1-2]n[3-4]", "rack1n3")],
)
def test_the_first_of_a_list_of_hosts(hosts, first):
    assert first_host(hosts) == first


def test_jobs_side_by_side_meet_on_ports_of_their_own():
    ports = [port + more for job in range(1, 300) for port in [port_of_job(job)] for more in (0, 1)]
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port_of_job(job) < 32768 for job in range(20_000))


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment(missing):
    environment = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(ConfigError, match=f"the environment sets .* but not {missing}: a launcher sets all"):
        place_from_environment(environment)


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_WORLD_SIZE", "1.5")])
def test_variables_that_are_no_numbers(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} in the environment is not a whole number"):
        place_from_environment(TORCHRUN | {name: value})


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "4"}, {"LOCAL_RANK": "-1"}])
def test_variables_out_of_range(wrong):
    with pytest.raises(ConfigError, match="a launcher sets 0 <= LOCAL_RANK <= RANK < WORLD_SIZE"):
        place_from_environment(TORCHRUN | wrong)


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-aa, GPU-bb,", 2), (" ", 0)]
)
def test_visible_gpus(visible, count, monkeypatch, tmp_path):
    for number in range(4):
        (tmp_path / f"nvidia{number}").touch()
    monkeypatch.setattr("megalite.config.place.Path", lambda path: tmp_path)
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_gpus_of_the_machine_are_its_device_files(monkeypatch, tmp_path):
    monkeypatch.setattr("megalite.config.place.Path", lambda path: tmp_path)
    assert count_gpus({}) == count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    assert count_gpus({}) == 3


def test_the_deepspeed_launchers_argument_is_dropped():
    assert drop_local_rank(["--local_rank=1", "seed=1", "--local-rank=0"]) == ["seed=1"]
    assert drop_local_rank(["--local_rank", "1", "seed=1", "--local-rank", "0"]) == ["seed=1"]
