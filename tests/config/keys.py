"""The keys of the schema, walked without the code under test."""

import dataclasses
import types
import typing
from typing import Any

from megalite.config import schema, schema_data, schema_monitor, schema_sweep

# Command's YAML in conf/ -> its dataclass, and the overrides without which it does not load.
PRIMARY = {
    "train": (schema.TrainConfig, ["data.train=store"]),
    "tokenizer_train": (schema_data.TokenizerTrainConfig, ["input=in", "output=out"]),
    "data_build": (schema_data.DataBuildConfig, ["input=in", "output=out", "tokenizer.path=tok"]),
    "data_repair": (schema_data.DataRepairConfig, ["store=in", "output=out"]),
    "data_stats": (schema_data.DataStatsConfig, ["store=in"]),
    "data_merge": (schema_data.DataMergeConfig, ["input=[a,b]", "output=out"]),
    "data_split": (schema_data.DataSplitConfig, ["store=in", "output=out"]),
    "data_convert": (schema_data.DataConvertConfig, ["input=in", "output=out"]),
    "data_pack": (schema_data.DataPackConfig, ["store=in", "sequence_length=8"]),
    "data_trace": (schema_data.DataTraceConfig, ["run_dir=run"]),
    "eval": (schema.EvaluateConfig, ["run_dir=run"]),
    "generate": (schema.GenerateConfig, ["run_dir=run"]),
    "report": (schema.ReportConfig, ["run_dir=run"]),
    "resume_check": (schema.ResumeCheckKeys, []),
    "sweep": (schema_sweep.SweepKeys, []),
    "doctor": (schema.DoctorConfig, []),
    "jobs": (schema_monitor.JobsConfig, []),
    "logs": (schema_monitor.LogsConfig, ["run_dir=run"]),
}


def leaf_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> its type, for every value of a configuration; a group that may be null is walked into."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        inner = group_of(hint)
        keys |= leaf_keys(inner, f"{prefix}{name}.") if inner else {f"{prefix}{name}": hint}
    return keys


def group_of(hint: Any) -> type | None:
    """The dataclass behind `hint`, or behind `hint | None`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint
