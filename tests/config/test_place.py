import pytest

from megalite.config.place import Place, count_gpus, drop_local_rank, place_from_environment
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
