"""Sampling: the choice of a token, and whole texts from a run directory."""

import dataclasses
from collections import Counter

import pytest
import torch

from megalite.config.frozen import save_config
from megalite.config.schema import DataConfig, EvaluateConfig, GenerateConfig, ModelConfig, StoreConfig
from megalite.errors import CheckpointError, ConfigError
from megalite.evaluate import evaluate
from megalite.generate import generate, pick_token, sample_tokens
from megalite.mesh import single_mesh
from megalite.models import build_model, materialize
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import make_tokenizer
from tests.runs import tiny_config, train_on_ranks, write_store
from tests.stores import make_store

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])
CPU = torch.device("cpu")
TOGETHER = DataConfig(train=())


def config_of(**keys) -> GenerateConfig:
    return GenerateConfig(run_dir="unused", **keys)


def drawn(count: int = 400, **keys) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(pick_token(LOGITS.clone(), config_of(**keys), generator) for _ in range(count))


def test_temperature_zero_is_the_likeliest():
    assert drawn(temperature=0.0) == {1: 400}


def test_frequencies_follow_the_softmax_at_the_temperature():
    counts, probabilities = drawn(4000, temperature=2.0), (LOGITS / 2.0).softmax(-1)
    for token, probability in enumerate(probabilities.tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_top_k_keeps_k():
    assert set(drawn(top_k=2)) == {1, 2}
    assert set(drawn(4000, top_k=4)) == {0, 1, 2, 3}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # Probabilities 0.087, 0.645, 0.237, 0.032 (softmax of the logits).
    assert set(drawn(top_p=0.5)) == {1}
    assert set(drawn(top_p=0.7)) == {1, 2}
    assert set(drawn(4000, top_p=1.0)) == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def model():
    return random_model()


def random_model(**changes):
    sizes = {"vocab_size": 50, "max_sequence_length": 24, "num_layers": 2, "hidden_size": 32}
    model = build_model(ModelConfig(**sizes, num_attention_heads=4, **changes), single_mesh(CPU))
    materialize(model, single_mesh(CPU), seed=3)
    return model.eval()


def texts(model, prompt, end=49, longest=24, data=TOGETHER, **keys) -> list[int]:
    config = config_of(**keys)
    generator = torch.Generator().manual_seed(config.seed)
    return list(sample_tokens(model, prompt, end, longest, config, generator, data))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_figures_that_are_no_numbers_are_an_error(temperature):
    logits = LOGITS.clone()
    logits[1] = torch.nan
    with pytest.raises(CheckpointError, match="inf or nan"):
        pick_token(logits, config_of(temperature=temperature), torch.Generator())


def test_the_cache_gives_what_reading_everything_again_gives(model):
    found = texts(model, [5, 6, 7], temperature=0.0, max_new_tokens=12, end=-1)
    tokens = [5, 6, 7]
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[3:]


def test_a_text_sees_nothing_of_the_document_before_it():
    """Trained so: what stands before an end-of-document token changes nothing."""
    model = random_model(init_std=0.3)  # large weights: what is seen changes what follows
    apart = DataConfig(train=(), document_attention=True, document_positions=True)

    def continued(before, data):
        return texts(model, [*before, 49, 5, 6, 7], data=data, end=-1 if data is TOGETHER else 49, max_new_tokens=6)

    first, second, third = (continued(before, apart) for before in ([], [1, 2], [8] * 9))
    assert first == second == third
    assert continued([1, 2], TOGETHER) != continued([8, 3], TOGETHER)


def test_the_same_seed_repeats_and_another_differs(model):
    assert texts(model, [5], seed=1, max_new_tokens=15) == texts(model, [5], seed=1, max_new_tokens=15)
    assert texts(model, [5], seed=1, max_new_tokens=15) != texts(model, [5], seed=2, max_new_tokens=15)


def test_generation_stops_at_the_end_of_the_document_and_of_the_positions(model):
    first = texts(model, [5, 6], temperature=0.0, max_new_tokens=1, end=-1)[0]
    assert texts(model, [5, 6], temperature=0.0, end=first) == []
    assert len(texts(model, [5] * 20, end=-1, max_new_tokens=100)) == 4


def trained(folder):
    """A store, the configuration of a run of three steps that is evaluated on it, and the run's last row."""
    store = write_store(folder / "words")
    data = {"train": str(store), "validation": [str(store)], "sequence_length": 32}
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 300, "max_sequence_length": 64}
    config = tiny_config(folder / "run", store, model=model, data=data, trainer={"steps": 3})
    return store, config, train_on_ranks(config, 1)[-1]


def test_a_run_is_evaluated_as_it_was_in_training(tmp_path):
    store, _, last = trained(tmp_path)
    found = evaluate(EvaluateConfig(run_dir=str(tmp_path / "run")))
    assert found == pytest.approx({key: value for key, value in last.items() if key.startswith("eval/")}, rel=1e-5)
    named = evaluate(EvaluateConfig(run_dir=str(tmp_path / "run"), data=(StoreConfig(path=str(store), name="x"),)))
    assert named["eval/x/loss"] == pytest.approx(found["eval/words/loss"])
    load_tokenizer(make_tokenizer(tmp_path)).save(tmp_path / "run/tokenizer")
    assert evaluate(EvaluateConfig(run_dir=str(tmp_path / "run"))) == pytest.approx(found)  # a store without any
    other = make_store(tmp_path / "other", tokenizer="b")
    with pytest.raises(ConfigError, match=r"other was built with another tokenizer \(b, digest b0000000\) than"):
        evaluate(EvaluateConfig(run_dir=str(tmp_path / "run"), data=(StoreConfig(path=str(other)),)))


def test_a_checkpoint_is_opened_as_the_model_it_was_saved_from(tmp_path):
    """Not as the one that config.yaml describes, whose activation may have changed since."""
    _, config, last = trained(tmp_path)
    changed = dataclasses.replace(config.model, activation="relu_squared")
    save_config(dataclasses.replace(config, model=changed), tmp_path / "run/config.yaml")
    found = evaluate(EvaluateConfig(run_dir=str(tmp_path / "run")))
    assert found["eval/words/loss"] == pytest.approx(last["eval/words/loss"], rel=1e-5)


def test_a_text_that_ends_before_it_was_asked_to_is_said(tmp_path, caplog):
    trained(tmp_path)
    load_tokenizer(make_tokenizer(tmp_path)).save(tmp_path / "run/tokenizer")
    caplog.clear()
    config = GenerateConfig(run_dir=str(tmp_path / "run"), max_new_tokens=63)
    next(generate(config))
    assert not caplog.messages
    next(generate(dataclasses.replace(config, max_new_tokens=64)))
    assert caplog.messages == [
        "max_new_tokens: found 64, but after a prompt of 1 tokens the model has positions for 63: texts end there"
    ]


def test_what_cannot_be_opened_is_one_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        next(generate(GenerateConfig(run_dir=str(tmp_path / "run"))))
