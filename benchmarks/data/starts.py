"""Start-up and the order, each in a process of its own: `python -m benchmarks.data.starts open STORE` or `order`.

Prints one JSON object. `open`: milliseconds, on the clock and of CPU, from after the imports to the first batch of 8
rows of 2,048 tokens, and the process's anonymous memory then. `order`: microseconds of CPU for one sample, asked for
alone and 4,096 at a time.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np

from megalite.data.dataset import BlendedDataset
from megalite.data.format import TokenStore
from megalite.data.mixture import Segment
from megalite.data.order import SampleOrder

LENGTH, ROWS = 2048, 8


def open_store(path: str) -> dict[str, float]:
    started, cpu_started = time.perf_counter(), time.process_time()
    store = TokenStore.open(path)
    rows = BlendedDataset([(store, 1.0)], LENGTH, seed=1).samples(np.arange(ROWS))
    done, cpu_done = time.perf_counter(), time.process_time()
    assert rows.shape == (ROWS, LENGTH + 1)
    anonymous = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert anonymous
    return {
        "milliseconds": 1e3 * (done - started),
        "cpu_milliseconds": 1e3 * (cpu_done - cpu_started),
        "anonymous_mib": int(anonymous[1]) / 1024,
    }


def order() -> dict[str, float]:
    """Three sources whose weights change twice."""
    later = [Segment(10**9, (1, 1, 1)), Segment(10**11, (2, 1, 5))]
    found = SampleOrder(1, [10**9, 10**6, 977], [0.7, 0.2, 0.1], later)
    figures = {}
    for name, count, repeats in (("alone", 1, 2000), ("together", 4096, 20)):
        indices = np.arange(10**12, 10**12 + count)
        found.locate(indices)
        started = time.process_time()
        for repeat in range(repeats):
            found.locate(indices + repeat)
        figures[f"microseconds_{name}"] = 1e6 * (time.process_time() - started) / count / repeats
    return figures


if __name__ == "__main__":
    print(json.dumps(open_store(sys.argv[2]) if sys.argv[1] == "open" else order()))
