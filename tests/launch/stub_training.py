"""Stands for a training in tests of sweeps: reads the frozen configuration, writes a run directory, knows signals.

Its loss falls with the steps towards a number that depends on the learning rate and the seed alone. With weight decay
above 1 it fails; where a file `hold` lies beside the sweep it does not end before that is gone.
"""

import ctypes
import fcntl
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path


def value(key):
    return re.search(rf"^\s*{key}: (.*)$", text, re.MULTILINE)[1].strip("'")


ctypes.CDLL(None).prctl(1, signal.SIGTERM)
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: asked.append(number))
text = os.environ["MEGALITE_CONFIG"]
run_dir, steps, lr = Path(value("run_dir")), int(value("steps")), float(value("lr"))
run_dir.mkdir(parents=True, exist_ok=True)
lock = open(run_dir / "run.lock", "a+")  # noqa: SIM115
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
(run_dir / "config.yaml").write_text(text)
metrics = run_dir / "metrics.jsonl"
rows = metrics.read_text().splitlines() if metrics.exists() else []
state = {"state": "running", "started": time.time(), "changed": 0, "world_size": 1, "host": "h", "pid": os.getpid()}
with open(run_dir / "lives.txt", "a") as lives:
    lives.write(f"{len(rows)} {os.environ.get('CUDA_VISIBLE_DEVICES')} {sorted(os.sched_getaffinity(0))} {lr!r}\n")
given = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
given |= {"port": value("port"), "group": value("group")}
(run_dir / "given.json").write_text(json.dumps(given))


def end(name, code, **more):
    stands = {"state": name, "step": len(rows), "last_step": steps, "exit_code": code}
    (run_dir / "state.json").write_text(json.dumps(state | stands | more))
    sys.exit(code)


(run_dir / "state.json").write_text(json.dumps(state))
if float(value("weight_decay")) > 1 and not (run_dir / ".." / ".." / "mended").exists():
    print("MegaliteError: a planted one")
    end("failed", 1, error="MegaliteError: a planted one")
while len(rows) < steps:
    if asked:
        end("preempted", 75)
    loss = (math.log10(lr) + 3) ** 2 + 1 / (1 + len(rows))
    row = {"step": len(rows) + 1, "loss": loss, "tokens_per_second": 10.0, "eval/held/loss": loss + 1}
    rows.append(json.dumps(row))
    metrics.write_text("\n".join(rows) + "\n")
    while (run_dir / ".." / ".." / "hold").exists() and not asked:
        time.sleep(0.02)
end("finished", 0)
