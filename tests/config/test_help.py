import pytest

from megalite.config import schema, schema_data
from megalite.config.help import describe_groups, describe_keys
from tests.config.keys import PRIMARY, leaf_keys


@pytest.mark.parametrize("primary", PRIMARY)
def test_every_key_has_a_line(primary):
    cls, _ = PRIMARY[primary]
    lines = {line.split("=")[0].strip(): line for line in describe_keys(cls, primary)}
    keys = set(leaf_keys(cls))
    nullable = {key for key in keys if key.startswith("model.rotary_scaling.")}  # one line for the group
    assert set(lines) - {"model.rotary_scaling"} == keys - nullable


def test_lines_show_the_default_of_the_command_the_type_and_the_comment():
    lines = [line.strip() for line in describe_keys(schema.TrainConfig, "train")]
    assert "run_name=null  (text)" in lines
    assert "run_dir=outputs/${run_name}  (text)" in lines
    assert "model.max_sequence_length=256" in "\n".join(lines), "what the default model says"
    assert "engine.compile=false  (bool)  # torch.compile of each block" in lines
    assert "optimizer.betas=[0.9, 0.95]  (list of float)" in lines
    assert "schedule.name=cosine  (constant|cosine|inverse_sqrt|linear)" in lines
    assert "trainer.stop_after=null  (int or null)  # stop and save at this step" in "\n".join(lines)
    assert "data.train=???  (list of path, or {path, weight, name})" in lines
    assert any(line.startswith("model.rotary_scaling=null  ({method, factor, ") for line in lines)
    assert "input=???  (list of text)" in "\n".join(describe_keys(schema_data.DataBuildConfig, "data_build"))


def test_groups_show_their_options():
    lines = describe_groups(schema.TrainConfig)
    assert "  engine=zero0|zero1|zero2|zero3|zero3_offload" in lines
    assert any(line.startswith("  experiment=") and "quickstart" in line for line in lines)
    assert describe_groups(schema.GenerateConfig) == []
