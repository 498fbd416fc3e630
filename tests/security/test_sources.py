"""S1: what could run code from a file, or from a text, stands nowhere in what is installed."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN = re.compile(
    r"\bimport pickle|\bfrom pickle|\bimport (dill|cloudpickle|marshal|shelve)\b|torch\.load\(|torch\.save\("
    r"|allow_pickle|yaml\.load\(|yaml\.unsafe|(?<![\w.])eval\(|(?<![\w.])exec\(|shell=True|os\.system|os\.popen|extractall"
    r"|trust_remote_code|__import__\(|hydra\.utils\.instantiate|joblib|hub\.load"
)


def sources():
    for folder in ("megalite", "launch", "data_tools", "conf"):
        yield from (ROOT / folder).rglob("*.py")
    yield ROOT / "setup.py"


def test_nothing_that_runs_what_it_reads():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []


def test_the_search_would_find_them():
    planted = ["import pickle", "x = torch.load(path)", "np.load(p, allow_pickle=True)", "y = eval(text)",
               "subprocess.run(c, shell=True)", "yaml.load(f)", "AutoModel(trust_remote_code=True)"]  # fmt: skip
    assert all(FORBIDDEN.search(line) for line in planted)
    assert not FORBIDDEN.search("model.eval()")
