import numpy as np
import pytest
import torch

from megalite.config.schema import DataConfig, StoreConfig, WeightsConfig
from megalite.data.dataset import BlendedDataset, build_dataset
from megalite.data.format import TokenStore
from megalite.data.loader import Loader
from megalite.data.writer import StoreWriter
from megalite.errors import ConfigError, DataError

S = 8


def counting_store(path, start: int, tokens: int) -> TokenStore:
    """A store whose stream is start, start + 1, ... so that a window shows where it comes from."""
    with StoreWriter(path, vocab_size=5000, end_of_document=start + tokens - 1) as writer:
        writer.add_document(np.arange(start, start + tokens - 1), tokens)
    return TokenStore.open(path)


@pytest.fixture
def dataset(tmp_path) -> BlendedDataset:
    stores = [(counting_store(tmp_path / "a", 0, 813), 3.0), (counting_store(tmp_path / "b", 2000, 100), 1.0)]
    return BlendedDataset(stores, S, seed=5)


def test_samples_are_windows_of_the_stream(dataset):
    assert [view.num_units for view in dataset.views] == [812 // S, 99 // S]
    indices = np.arange(400)
    samples = dataset.samples(indices)
    assert samples.dtype == np.uint16
    assert samples.shape == (400, S + 1)
    sources, windows, _ = dataset.order.locate(indices)
    first = np.where(sources == 0, 0, 2000) + windows * S
    np.testing.assert_array_equal(samples, first[:, None] + np.arange(S + 1))
    assert abs((sources == 0).mean() - 0.75) < 0.02


def test_an_epoch_predicts_every_token_once(tmp_path):
    dataset = BlendedDataset([(counting_store(tmp_path / "a", 0, 10 * S + 1), 1.0)], S, seed=0)
    targets = dataset.samples(np.arange(10))[:, 1:]
    assert sorted(targets.ravel().tolist()) == list(range(1, 10 * S + 1))


@pytest.mark.parametrize(("tokens", "fits"), [(S + 1, True), (S, False), (1, False)])
def test_store_shorter_than_a_window(tmp_path, tokens, fits):
    store = counting_store(tmp_path / "a", 0, tokens)
    if fits:
        assert BlendedDataset([(store, 1.0)], S, 0).samples([0, 1]).shape == (2, S + 1)
    else:
        with pytest.raises(DataError, match=f"holds {tokens} tokens, one window needs 9.*data.sequence_length"):
            BlendedDataset([(store, 1.0)], S, 0)


@pytest.mark.parametrize(("micro", "data_size"), [(12, 1), (3, 1), (1, 1), (6, 2), (3, 4), (1, 12), (2, 3)])
def test_layouts_see_the_same_global_batch(dataset, micro, data_size):
    for step in (0, 1, 7):
        expected = dataset.samples(np.arange(step * 12, (step + 1) * 12))
        ranks = [Loader(dataset, 12, micro, rank, data_size).micro_batches(step * 12) for rank in range(data_size)]
        assert all(len(batches) == 12 // (micro * data_size) for batches in ranks)
        assert all(batch.dtype == torch.uint16 for batches in ranks for batch in batches)
        together = [batches[m] for m in range(len(ranks[0])) for batches in ranks]
        np.testing.assert_array_equal(torch.cat(together).numpy(), expected)


def test_batches_are_pinned_when_asked(dataset, monkeypatch):
    pinned, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, pin_memory, **more: pinned.append(pin_memory) or empty(*args, **more)
    )
    Loader(dataset, 4, 4, 0, 1).micro_batches(0)
    Loader(dataset, 4, 4, 0, 1, pin=True).micro_batches(0)
    assert pinned == [False, True]


def test_steps_in_any_order_are_the_same_steps(dataset):
    """What is looked up ahead serves the steps that follow, and no others."""
    loader = Loader(dataset, 12, 3, 1, 2)
    for start in (0, 12, 36, 24, 5, 17, 12 * 700, 12 * 10**9, 0):
        fresh = Loader(dataset, 12, 3, 1, 2).micro_batches(start)
        found = loader.micro_batches(start)
        assert [batch.tolist() for batch in found] == [batch.tolist() for batch in fresh]


def test_a_configuration_with_later_weights(tmp_path):
    counting_store(tmp_path / "a", 0, 813)
    counting_store(tmp_path / "b", 2000, 813)
    stores = (StoreConfig(path=str(tmp_path / "a"), weight=3.0), StoreConfig(path=str(tmp_path / "b")))
    schedule = (WeightsConfig(step=5, weights=(0.0, 2.0)), WeightsConfig(step=6, weights=(1.0, 1.0)))
    dataset = build_dataset(DataConfig(train=stores, schedule=schedule, sequence_length=S), 4, seed=1)
    of_b = (dataset.samples(np.arange(40))[:, 0] >= 2000).reshape(10, 4).sum(axis=1)
    assert of_b.tolist() == [1, 1, 1, 1, 1, 4, 2, 2, 2, 2]
    use = dataset.use(24)
    assert [(source.samples, source.epochs) for source in use] == [(15, 15 / 101), (9, 9 / 101)]


def test_stores_of_two_types(tmp_path):
    stores = [(counting_store(tmp_path / "a", 0, 813), 1.0)]
    with StoreWriter(tmp_path / "wide", vocab_size=100_000, end_of_document=99_999) as writer:
        writer.add_document(np.arange(90_000, 90_500), 1)
    stores.append((TokenStore.open(tmp_path / "wide"), 1.0))
    dataset = BlendedDataset(stores, S, seed=0)
    (batch,) = Loader(dataset, 8, 8, 0, 1).micro_batches(0)
    assert batch.dtype == torch.uint32
    ids = batch.long()
    assert ((ids[:, 1:] - ids[:, :-1]) == 1).all()
    assert ((ids >= 90_000).sum(dim=1) == torch.tensor([0, S + 1] * 4)).all()


def test_batch_that_does_not_divide(dataset):
    with pytest.raises(ConfigError, match=r"trainer.global_batch_size 10 .* 4 x data axis 2"):
        Loader(dataset, 10, 4, 0, 2)
