"""Which documents a step used and back, against looking at every token of every sample."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megalite.checkpoint_folder import commit, create_temporary
from megalite.checkpoint_format import Manifest
from megalite.config.compose import config_values
from megalite.config.frozen import save_config
from megalite.data.dataset import build_dataset
from megalite.data.format import TokenStore
from megalite.data.packing import write_packing
from megalite.data.writer import StoreWriter
from megalite.data_tools.trace import Trace
from megalite.errors import ConfigError
from megalite.launch.data import views as data_views
from tests.runs import tiny_config

S, BATCH, END = 8, 4, 0
STEPS = 30


def write_store(path, first, num_documents, seed):
    """Every token but the ends is another, counted from `first`."""
    rng = np.random.default_rng(seed)
    with StoreWriter(path, vocab_size=10_000, end_of_document=END, source=path.name, shard_tokens=100) as writer:
        for _ in range(num_documents):
            length = int(rng.integers(1, 30))
            writer.add_document(np.arange(first, first + length), num_bytes=length)
            first += length
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    paths = [write_store(root / "a", 1, 30, 0), write_store(root / "b", 5000, 12, 1)]
    for path in paths:
        write_packing(TokenStore.open(path), "best_fit", S)
    return paths


@pytest.fixture(params=["stream", "best_fit"])
def config(request, stores, tmp_path):
    data = {
        "train": [{"path": str(stores[0]), "weight": 3}, str(stores[1])],
        "schedule": [{"step": 10, "weights": [1, 3]}],
        "sequence_length": S,
        "packing": request.param,
    }
    trainer = {"steps": STEPS, "global_batch_size": BATCH}
    config = tiny_config(tmp_path / "run", model={"vocab_size": 10_000}, data=data, trainer=trainer)
    save_config(config, tmp_path / "run/config.yaml")
    return config


def tokens_by_step(config):
    """Step -> the set of tokens of its samples, ends left out."""
    samples = build_dataset(config.data, BATCH, config.seed).samples(np.arange(STEPS * BATCH))
    if config.data.packing != "stream":
        samples = samples[:, 1]  # the labels
    return {step + 1: set(samples[step * BATCH : (step + 1) * BATCH].ravel().tolist()) - {END} for step in range(STEPS)}


def test_a_step_names_its_documents(config):
    trace = Trace(config.run_dir)
    stores = {store.source: TokenStore.open(store.path) for store in config.data.train}
    for step, expected in tokens_by_step(config).items():
        uses = list(trace.documents(step))
        assert {use.sample for use in uses} == set(range((step - 1) * BATCH, step * BATCH))
        found = [stores[use.source].document(use.document)[use.start : use.stop] for use in uses]
        assert set(np.concatenate(found).tolist()) - {END} == expected
        for use in uses:
            document = stores[use.source].document(use.document)
            assert 0 <= use.start < use.stop <= use.num_tokens == len(document)
            assert use.text == str(document[:-1][:16].tolist()), "there is no tokenizer here: its first ids"


def test_a_document_names_its_steps(config):
    trace = Trace(config.run_dir)
    samples = defaultdict(set)
    for step in range(1, STEPS + 1):
        for use in trace.documents(step):
            samples[use.source, use.document].add(use.sample)
    for store in config.data.train:
        for index in range(TokenStore.open(store.path).num_documents):
            uses = trace.steps(f"{store.source}:{index}")
            assert {use.sample for use in uses} == samples[store.source, index]
            assert trace.steps(f"{store.path}:{index}") == uses
            assert [use.sample for use in uses] == sorted(use.sample for use in uses)
            assert all(use.sample // BATCH + 1 == use.step for use in uses)


def test_only_the_steps_so_far(config, tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "run/metrics.jsonl").write_text(text + '{"step": 6, "lo')
    trace = Trace(config.run_dir)
    assert trace.steps_so_far == 5
    found = {use.step for index in range(30) for use in trace.steps(f"a:{index}")}
    assert found == {1, 2, 3, 4, 5}
    assert list(trace.documents(20)), "what a later step will take is known too"


@pytest.mark.parametrize("document", ["a", "a:", "a:x", "c:1", ":1", "a:-1", "a:30"])
def test_documents_that_do_not_exist(config, document):
    with pytest.raises(ConfigError, match=r"^document: found"):
        Trace(config.run_dir).steps(document)


def save_checkpoint(config, samples_consumed, digests, **since):
    manifest = Manifest(
        step=5, samples_consumed=samples_consumed, tokens_seen=0, skipped_steps=0, skipped_in_a_row=0, optimizer_step=5,
        loss_scaler={}, seed=7, config=config_values(config), stores=digests, topology={}, versions={}, files=[],
        **since,
    )  # fmt: skip
    commit(create_temporary(Path(config.run_dir) / "checkpoints", 5), manifest)


def test_steps_before_the_data_were_changed_are_refused(config):
    """Whatever was changed, and before the next checkpoint as after it."""
    digests = [TokenStore.open(store.path).digest for store in config.data.train]
    save_checkpoint(config, 5 * BATCH, digests)
    before = list(Trace(config.run_dir).documents(7))
    assert list(Trace(config.run_dir).documents(1))
    for saved, stores in [
        (config, [digests[0], "other"]),
        (dataclasses.replace(config, seed=8), digests),
        (dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, global_batch_size=2)), digests),
    ]:
        save_checkpoint(saved, 5 * BATCH, stores)
        trace = Trace(config.run_dir)
        with pytest.raises(ConfigError, match=r"step: found 5, allowed: 6 \(the data, .* changed there\) to trainer"):
            list(trace.documents(5))
        assert list(trace.documents(7)) == before
        assert not any(use.step <= 5 for index in range(30) for use in trace.steps(f"a:{index}"))
    save_checkpoint(config, 5 * BATCH + 2, digests, data_since_step=3, data_since_sample=3 * BATCH + 2)
    trace = Trace(config.run_dir)
    first = next(iter(trace.documents(4))).sample
    assert first == 3 * BATCH + 2
    assert {use.step for index in range(30) for use in trace.steps(f"a:{index}")} <= set(
        range(4, trace.steps_so_far + 1)
    )


def test_the_command(config, capsys):
    run_dir = config.run_dir
    assert data_views.trace([f"run_dir={run_dir}", "step=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample 8  ")
    assert all(" tokens " in line for line in lines)
    source, _, rest = lines[0].partition("  ")[2].partition(":")
    assert data_views.trace([f"run_dir={run_dir}", f"document={source}:{rest.split()[0]}"]) == 0
    assert "step 3  sample 8  epoch 0\n" in capsys.readouterr().out
    for argv in ([], ["step=1", "document=a:0"], ["step=0"], ["step=31"]):
        with pytest.raises(ConfigError, match="step"):
            data_views.trace([f"run_dir={run_dir}", *argv])


def test_the_command_that_packs(tmp_path, capsys):
    write_store(tmp_path / "out/train/a", 1, 10, 0)
    write_store(tmp_path / "out/validation/a", 1, 3, 0)
    assert data_views.pack([f"store={tmp_path}/out", "sequence_length=16"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert f"{tmp_path}/out/train/a.packing/best_fit-16: 1" in printed[0]
    for again in range(2):
        argv = [f"store={tmp_path}/out/train/a", "sequence_length=16", "packing=documents", f"overwrite={bool(again)}"]
        assert data_views.pack(argv) == 0
    with pytest.raises(ConfigError, match="sequence_length: found 0"):
        data_views.pack([f"store={tmp_path}/out", "sequence_length=0"])
