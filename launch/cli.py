"""The `megalite` command: finds the subcommand, prints help, and turns errors into one message and an exit code."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import megalite
from megalite.config import schema, schema_data, schema_monitor, schema_sweep
from megalite.config.help import describe_groups, describe_keys
from megalite.errors import EXIT_CONFIG, EXIT_OK, MegaliteError


@dataclass(frozen=True)
class Command:
    """One subcommand. `config`: the dataclass whose keys it takes, and the name of its YAML."""

    function: str  # module:function, called with the arguments after the subcommand's name
    summary: str
    example: str
    config: tuple[type, str] | None = None
    notes: str = ""
    lists: tuple[str, str] | None = None  # a heading, and module:function of megalite that gives the lines below it
    more: tuple[type, str] | None = None  # keys of the command's own, where `config` is that of another command


COMMANDS = {
    "tokenizer train": Command(
        "tokenizer:train",
        "train a tokenizer on raw text",
        "megalite tokenizer train input=books/*.txt output=tokenizers/books tokenizer.vocab_size=8192",
        (schema_data.TokenizerTrainConfig, "tokenizer_train"),
    ),
    "data build": Command(
        "data.build:build",
        "turn raw text into a token store",
        "megalite data build input=books/*.txt output=stores/books tokenizer.path=tokenizers/books",
        (schema_data.DataBuildConfig, "data_build"),
        notes="clean: a preset (conf/clean/) or a list of steps, clean=[nfc,{step:lines,options:{min_characters:20}}].",
        lists=("steps of clean, and their options:", "data_tools.cleaning:describe_steps"),
    ),
    "data verify": Command(
        "data.build:verify",
        "compare a token store with its checksums",
        "megalite data verify store=stores/books/train/books",
        notes="keys:\n  store=???  (path)  # a token store, or a folder with several",
    ),
    "data inspect": Command(
        "data.build:inspect",
        "look at a token store and some of its documents",
        "megalite data inspect store=stores/books/train/books documents=3",
        notes="keys:\n  store=???  (path)  # a token store, or a folder with several\n"
        "  documents=3  (int)  # so many of each are printed",
    ),
    "data stats": Command(
        "data.stores:stats",
        "count documents, tokens, lengths and the vocabulary's use",
        "megalite data stats store=stores/books/train/books output=stats.json",
        (schema_data.DataStatsConfig, "data_stats"),
    ),
    "data repair": Command(
        "data.stores:repair",
        "write what is whole of a damaged store as a new one",
        "megalite data repair store=stores/books/train/books output=stores/books_repaired",
        (schema_data.DataRepairConfig, "data_repair"),
        notes="Shards whose digest differs are lost; offsets are rebuilt from the tokens that end documents, byte\n"
        "counts by decoding. The damaged store is not touched.",
    ),
    "data merge": Command(
        "data.stores:merge",
        "put stores of one tokenizer together",
        "megalite data merge input=[stores/a/train/a,stores/b/train/b] output=stores/merged",
        (schema_data.DataMergeConfig, "data_merge"),
    ),
    "data split": Command(
        "data.stores:split",
        "cut a store into several",
        "megalite data split store=stores/merged output=stores/split fraction=0.1",
        (schema_data.DataSplitConfig, "data_split"),
    ),
    "data convert": Command(
        "data.stores:convert",
        "Megatron's .bin and .idx to a token store, and back",
        "megalite data convert input=books_text_document output=stores/books tokenizer.path=tokenizers/books",
        (schema_data.DataConvertConfig, "data_convert"),
        notes="To Megatron, the input is a token store: output/<name>.bin and .idx are written.",
    ),
    "data pack": Command(
        "data.views:pack",
        "lay a store's documents out in sequences, for data.packing",
        "megalite data pack store=stores/books/train/books sequence_length=1024",
        (schema_data.DataPackConfig, "data_pack"),
    ),
    "data trace": Command(
        "data.views:trace",
        "which documents a step trained on, and back",
        "megalite data trace run_dir=outputs/quickstart step=100",
        (schema_data.DataTraceConfig, "data_trace"),
        notes="Back: document=SOURCE:INDEX names the steps that trained on it.",
    ),
    "train": Command(
        "training:train",
        "train a model; the same command again continues",
        "megalite train model=gpt2_124m data.train=stores/books/train/books parallel=tp2 launch.nproc_per_node=4",
        (schema.TrainConfig, "train"),
        notes="--cfg prints the configuration, composed and checked, as YAML and ends.\n"
        "-m trains once for every combination of the keys that have several values, or values of Optuna's choice:\n"
        "  megalite train -m optimizer.lr=1e-4,3e-4 model=tiny,gpt2_124m data.train=stores/books/train/books\n"
        "  megalite train -m sweep.trials=12 'optimizer.lr=tag(log,interval(1e-5,1e-2))' data.train=...\n"
        "Values: a,b  range(1,9,2)  glob(llama*)  interval(0,1)  int(interval(1,8))  tag(log,...), as Hydra has them.\n"
        "The same command skips what is finished and shows the table; with launch=slurm it submits one array.",
        more=(schema_sweep.SweepKeys, "sweep"),
    ),
    "eval": Command(
        "commands:evaluate",
        "loss, perplexity and bits per byte of a checkpoint",
        "megalite eval run_dir=outputs/quickstart",
        (schema.EvaluateConfig, "eval"),
    ),
    "generate": Command(
        "commands:generate",
        "let a checkpoint write",
        'megalite generate run_dir=outputs/quickstart prompt="ROMEO:" temperature=0.8',
        (schema.GenerateConfig, "generate"),
    ),
    "import": Command(
        "commands:import_weights",
        "weights of Hugging Face into a run directory at step 0",
        "megalite import hf=models/llama output=outputs/llama",
        (schema.ImportConfig, "import"),
        notes="To train on from there: megalite train run_dir=outputs/llama model=... data.train=...",
    ),
    "export": Command(
        "commands:export_weights",
        "a checkpoint as a folder that transformers loads",
        "megalite export run_dir=outputs/quickstart output=models/quickstart",
        (schema.ExportConfig, "export"),
    ),
    "report": Command(
        "report.command:report",
        "draw a run's curves into report.html",
        "megalite report run_dir=outputs/quickstart",
        (schema.ReportConfig, "report"),
    ),
    "jobs": Command(
        "monitor.jobs:jobs",
        "how the runs below a folder stand",
        "megalite jobs folder=outputs watch=5",
        (schema_monitor.JobsConfig, "jobs"),
        notes="running?: the run's lock and its ranks' signs of life contradict each other. died: it was running, and\n"
        "nobody is there any more. Slurm is asked where there is one.",
    ),
    "logs": Command(
        "monitor.logs:logs",
        "the logs of all ranks by time, the first error first",
        "megalite logs run_dir=outputs/quickstart errors=true",
        (schema_monitor.LogsConfig, "logs"),
    ),
    "parity": Command(
        "parity:parity",
        "does a layout change the numbers of my model?",
        "megalite parity model=llama_8b parallel.tensor=1,2 engine.zero_stage=0,1,3",
        (schema.TrainConfig, "train"),
        notes="The model is made small (2 layers, width 128, vocabulary 500, dropout 0), with all its switches. No\n"
        "data is read. parallel.* and engine.* take several values with commas: all combinations are tried.",
    ),
    "resume-check": Command(
        "resume_check.command:resume_check",
        "does an interruption change the numbers of my run?",
        "megalite resume-check data.train=stores/books/train/books parallel=tp2 launch.nproc_per_node=2",
        (schema.TrainConfig, "train"),
        notes="Takes the keys of megalite train and runs them as they are (model, data, layout, precision, dropout)\n"
        "for a few steps in temporary directories: straight through; stopped and resumed; killed with -9 and resumed.\n"
        "Losses, gradient norms and every tensor of the last checkpoints are compared bit for bit. Your run_dir is\n"
        "neither read nor written. Replaced: trainer.stop_after, log_every=1, when to save, and no evaluation; the\n"
        "learning rate still follows trainer.steps.\n"
        "Ranks run on this machine. For a training that needs more of them, train twice with your own launcher, with\n"
        "trainer.log_every=1 and the same trainer.stop_after, one of the two interrupted and continued on the way,\n"
        "and compare: megalite resume-check resume_check.compare=[outputs/straight,outputs/interrupted]",
        more=(schema.ResumeCheckKeys, "resume_check"),
    ),
    "doctor": Command(
        "doctor.command:doctor", "is this machine fit to run?", "megalite doctor", (schema.DoctorConfig, "doctor")
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (see megalite/errors.py)."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except MegaliteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `megalite ... | head`: the reader has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(arguments: list[str]) -> int:
    if arguments in (["--version"], ["version"]):
        print(f"megalite {megalite.__version__}")
        return EXIT_OK
    name, rest = _split(arguments)
    if name is None:
        asks_for_help = not arguments or arguments[0] in ("-h", "--help", "help") or arguments[-1] in ("-h", "--help")
        if not asks_for_help:
            print(f"megalite: there is no command {' '.join(arguments[:2])!r}\n", file=sys.stderr)
        print(_overview(), file=sys.stdout if asks_for_help else sys.stderr)
        return EXIT_OK if asks_for_help else EXIT_CONFIG
    if any(argument in ("-h", "--help") for argument in rest):
        print(_help(name))
        return EXIT_OK
    return _function(COMMANDS[name])(rest)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The subcommand, of one or two words, and what follows it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS and len(arguments) >= words:
            return name, arguments[words:]
    return None, arguments


def _function(command: Command) -> Callable[[list[str]], int]:
    module, _, function = command.function.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: megalite COMMAND key=value ...", "", *lines, "", "megalite COMMAND --help lists a command's keys."]
    )


def _help(name: str) -> str:
    command = COMMANDS[name]
    lines = [f"megalite {name}: {command.summary}", "", f"  {command.example}"]
    if command.notes:
        lines += ["", command.notes]
    if command.lists:
        heading, where = command.lists
        module, _, function = where.partition(":")
        lines += ["", heading, *getattr(importlib.import_module(f"megalite.{module}"), function)()]
    if command.more:
        lines += ["", "keys of its own:", *describe_keys(*command.more)]
    if command.config:
        cls, primary = command.config
        if groups := describe_groups(cls):
            lines += ["", "groups (each option is a file of keys in conf/):", *groups]
        lines += ["", f"keys (defaults; conf/{primary}.yaml):", *describe_keys(cls, primary)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
