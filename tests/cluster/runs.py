"""The same small training as a command line, for every launcher."""

from pathlib import Path

from megalite.metrics.jsonl import read_metrics
from tests.cluster.lab import BIN, Slurm, wait_until

FOUR = ("launch=slurm", "launch.nodes=2", "launch.nproc_per_node=2", "launch.start_timeout=120", "launch.grace=10")
STEPS = 80  # of a run that something happens to


def train_command(run_dir: Path | str, store: Path, *overrides: str, steps: int = 10) -> list[str]:
    """`megalite train` of a tiny model at tensor 2; with four ranks data 2."""
    return [
        str(BIN / "megalite"), "train", "run_name=tiny", f"run_dir={run_dir}", f"data.train={store}",
        "data.sequence_length=32", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
        "engine=zero1", "engine.precision=fp32", "parallel.tensor=2", "optimizer.lr=1e-3", f"trainer.steps={steps}",
        "trainer.log_every=1", "trainer.global_batch_size=8", "trainer.micro_batch_size=2", *overrides,
    ]  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    """Of every step so far."""
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def files(run_dir: Path) -> set[str]:
    """What a run leaves, but for what differs from start to start."""
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    ours = ("logs/slurm_", "logs/starts_", "job.")
    return {name for name in names if not name.startswith(ours)}


def await_log(run_dir: Path, text: str, seconds: float) -> str:
    """Until the jobs of a run have written `text`, which is returned."""
    wait_until(lambda: text in log(run_dir), seconds, lambda: f"{text!r} is not in {log(run_dir)[-3000:]}")
    return text


def log(run_dir: Path) -> str:
    """What the jobs of a run have written."""
    return "".join(path.read_text(errors="replace") for path in sorted(run_dir.glob("logs/slurm_*.log")))


def start(cluster: Slurm, store: Path, run_dir: Path, *overrides: str) -> str:
    """A job that has taken 40 steps and saved some; returns its number."""
    command = train_command(run_dir, store, *FOUR, "checkpoint.save_every=20", *overrides, steps=STEPS)
    done = cluster.user(*command, cwd=run_dir.parent)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(losses(run_dir)) >= 40, 400, lambda: f"it takes no steps: {log(run_dir)}")
    return (run_dir / "job.txt").read_text().strip()


def read_outputs(folder: Path) -> str:
    """What jobs have written below a folder."""
    return "\n".join(f"{path}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(folder.rglob("*.log")))
