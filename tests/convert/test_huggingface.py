"""Models of transformers in and out: the same logits, the same bits, the same text; what does not fit is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint import load_model
from megalite.config.compose import compose_train
from megalite.config.schema import EvaluateConfig, GenerateConfig, ModelConfig, ParallelConfig, RotaryScalingConfig
from megalite.convert.exporting import export_model
from megalite.convert.families import FAMILIES, family_for, plain, read_model
from megalite.convert.importing import import_model
from megalite.convert.tokenizer_files import export_tokenizer
from megalite.errors import CheckpointError, ConfigError, DataError, ResourceError
from megalite.evaluate import evaluate
from megalite.generate import sample_tokens
from megalite.launch.cli import main
from megalite.mesh import build_mesh
from megalite.models import build_model, materialize
from megalite.runs import load_run
from megalite.tokenizer import load_tokenizer
from tests.data_tools.corpora import make_tokenizer, texts
from tests.models.configs import GEMMA, MIXED
from tests.ranks import run_ranks
from tests.runs import tiny_config, train_on_ranks, write_store

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")

GPT2 = {"vocab_size": 301, "n_positions": 80, "n_embd": 48, "n_layer": 3, "n_head": 4}
LLAMA = {
    "vocab_size": 301, "max_position_embeddings": 80, "num_hidden_layers": 3, "hidden_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}  # fmt: skip
ROPE = {"rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = ROPE | {"rope_type": "yarn"}
LLAMA3 = ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2_free": ("GPT2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama_tied": ("Llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", LLAMA | {"rope_parameters": YARN}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
}


def theirs(name):
    """A model with random weights, norms and biases too: ones and zeros would hide a mix-up."""
    family, keys = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**keys)
    config._attn_implementation = "eager"  # sliding windows included
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A model of transformers and the folder it was saved to."""
    model = theirs(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def tokens():
    return torch.randint(301, (2, 40), generator=torch.Generator().manual_seed(1))


def our_logits(run_dir, config, tensor):
    mesh = build_mesh(ParallelConfig(tensor=tensor), CPU)
    model = build_model(config.model, mesh).eval()
    materialize(model, mesh, seed=0)
    load_model(model, run_dir / "checkpoints/step_00000000", mesh)
    with torch.no_grad():
        return model(tokens())


def test_logits_in_and_out(saved, tmp_path):
    model, folder = saved
    with torch.no_grad():
        wanted = model(tokens()).logits
    assert wanted.std() > 0.5  # logits of a size at which the bar means something
    config = import_model(folder, tmp_path / "run")
    for tensor in (1, 2):
        for found in run_ranks(tensor, our_logits, tmp_path / "run", config, tensor):
            assert (found - wanted).abs().max().item() <= 1e-5 * max(1, wanted.abs().max().item())
    family = export_model(tmp_path / "run/checkpoints/step_00000000", tmp_path / "out", "fp32", None)
    assert family.architecture == type(model).__name__
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(again) is type(model)
    with torch.no_grad():
        found = again(tokens()).logits
    assert (found - wanted).abs().max().item() <= 1e-5 * max(1, wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_is_bit_identical(saved, tmp_path, dtype):
    model, folder = saved
    model.to(dtype).save_pretrained(folder)
    import_model(folder, tmp_path / "run")
    export_model(tmp_path / "run/checkpoints/step_00000000", tmp_path / "out", None, None)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert after[name].dtype == dtype


def greedy_tokens(run_dir, config, tensor, prompt):
    """64 of our tokens after `prompt`; on every rank."""
    mesh = build_mesh(ParallelConfig(tensor=tensor, sequence=False), CPU)
    model = build_model(config.model, mesh).eval()
    materialize(model, mesh, seed=0)
    load_model(model, run_dir / "checkpoints/step_00000000", mesh)
    how = GenerateConfig(run_dir="", temperature=0.0, max_new_tokens=64)
    return list(sample_tokens(model, prompt, -1, 80, how, torch.Generator(), config.data))


def test_greedy_text_is_the_same(saved, tmp_path):
    model, folder = saved
    config = import_model(folder, tmp_path / "run")
    prompt = tokens()[0, :5]
    for tensor in (1, 2):
        for found in run_ranks(tensor, greedy_tokens, tmp_path / "run", config, tensor, prompt.tolist()):
            assert len(found) == 64
            with torch.no_grad():
                logits = model(torch.cat([prompt, torch.tensor(found)])[None]).logits[0, len(prompt) - 1 : -1]
            best = logits.topk(2)
            for step, token in enumerate(found):
                if best.values[step, 0] - best.values[step, 1] < 1e-4:
                    break
                assert token == best.indices[step, 0]


def test_shards_and_the_names_of_older_files_are_read(tmp_path):
    model = theirs("gpt2")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40kB")
    assert (tmp_path / "theirs/model.safetensors.index.json").is_file()
    import_model(tmp_path / "theirs", tmp_path / "sharded")
    shutil.rmtree(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs/model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1)}, tmp_path / "theirs/model.safetensors")
    import_model(tmp_path / "theirs", tmp_path / "old")
    paths = [tmp_path / name / "checkpoints/step_00000000/manifest.json" for name in ("sharded", "old")]
    sharded, old = (json.loads(path.read_text())["files"] for path in paths)
    assert sharded == old


def test_export_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.convert.exporting.SHARD_BYTES", 40_000)
    model = theirs("llama")
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run/checkpoints/step_00000000", tmp_path / "out", "fp32", None)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in again.values())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"), r"1 missing \(first model\.layers\.2\."),
        (lambda weights: weights.update(extra=torch.ones(1)), r"1 without a place \(first extra\)"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(2)}), r"norm\.weight is \(2,\), .* \(48,\)"),
        (lambda weights: weights["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight holds infinities or"),
        (
            lambda weights: weights.update({"lm_head.weight": torch.ones(301, 48, dtype=torch.int8)}),
            "lm_head.weight is I8; known: F32, BF16, F16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs/model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "theirs/model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; known: gpt2, llama"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ({"mlp_bias": True}, "attention_bias and mlp_bias differ"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; known: None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights is False; known: True"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx is True; known: False"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True; known: False"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True; known: False"),
        ({"num_hidden_layers": None}, r"model\.num_layers"),
        ({"is_causal": False}, "is_causal is False; known: True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate is False; known: True"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "mscale is 1.0; known: None"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
        ({"rope_parameters": YARN, "rope_scaling": LLAMA3}, "rope_parameters and rope_scaling say different things"),
        ({"num_key_value_heads": 3}, r"model\.num_key_value_heads: found 3"),
        ({"hidden_size": -48}, r"model\.hidden_size: found -48"),
        ({"rms_norm_eps": float("nan")}, r"model\.norm_eps: found nan"),
        ({"hidden_size": "wide"}, "describes no model|model.hidden_size"),
    ],
)
def test_architectures_that_are_not_ours_are_refused(tmp_path, keys, message):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "run")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        import_model(tmp_path, tmp_path / "run")
    theirs("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors").rename(tmp_path / "theirs/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle files .* are not read"):
        import_model(tmp_path / "theirs", tmp_path / "run")
    theirs("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match="run exists already"):
        import_model(tmp_path / "theirs", tmp_path / "run")


@pytest.mark.parametrize(("model", "key"), [(GEMMA, "soft_cap"), (MIXED, "activation")])
def test_a_model_that_transformers_does_not_have_is_refused(model, key):
    with pytest.raises(ConfigError, match=rf"no model of transformers .* nearest, \w+, differs in .*{key}"):
        family_for(model)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_file_leaves_out_is_what_transformers_takes(name):
    """Files of older versions lack keys; each family has defaults of its own."""
    family, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")()
    wanted = read_model(config.to_dict())
    own = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    own |= {"max_position_embeddings", "model_type", "n_positions", "n_embd", "n_layer", "n_head"}
    left = {key: value for key, value in config.to_dict().items() if key in own}
    assert read_model(left) == wanted


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_describes_itself(family):
    base = ModelConfig(vocab_size=100, activation="gelu_tanh")
    llama = dataclasses.replace(base, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False)
    own = {
        "gpt2": base,
        "llama": llama,
        "mistral": dataclasses.replace(llama, sliding_window=8),
        "qwen2": dataclasses.replace(llama, qkv_bias=True),
        "qwen3": dataclasses.replace(llama, qk_norm=True),
    }[family.model_type]
    assert family_for(own) == family
    assert read_model({"model_type": family.model_type, **family.write(own)}).hidden_size == own.hidden_size


def test_a_run_trains_on_from_imported_weights_and_is_exported_with_its_tokenizer(tmp_path, capsys):
    """The commands: import, train on, evaluate, export, read by transformers."""
    theirs("llama").save_pretrained(tmp_path / "theirs")
    run_dir, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", f"hf={tmp_path}/theirs", f"output={run_dir}"]) == 0
    assert "model.num_key_value_heads=2" in capsys.readouterr().out
    store = write_store(tmp_path / "words")
    data = {"train": str(store), "validation": [str(store)], "sequence_length": 32}
    manifest = json.loads((run_dir / "checkpoints/step_00000000/manifest.json").read_text())
    config = tiny_config(run_dir, store, model=manifest["config"]["model"], data=data, trainer={"steps": 4})
    rows = train_on_ranks(config, 2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    evaluated = evaluate(EvaluateConfig(run_dir=str(run_dir)))
    assert evaluated["eval/words/loss"] == pytest.approx(rows[-1]["eval/words/loss"], rel=1e-5)
    shutil.copytree(make_tokenizer(tmp_path), run_dir / "tokenizer")
    assert main(["export", f"run_dir={run_dir}", f"output={out}"]) == 0
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    wanted |= {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == wanted
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    run = load_run(str(run_dir), None)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, run.model(tokens()), atol=1e-4, rtol=0)


def train_with_symbols(folder: Path, **settings) -> Path:
    """A lossless SentencePiece model with pieces that its user defined."""
    lossless = dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    sentences = [line for text in texts() for line in text.split("\n") if line and "\x00" not in line]
    with open(folder / "some.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=600, minloglevel=2,
            byte_fallback=True, user_defined_symbols=["<sep>", "<|im_start|>", "a▁river", "of night"],
            **lossless, **settings,
        )  # fmt: skip
    return folder / "some.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_that_a_user_defined_are_exported_as_they_are_found(tmp_path, kind):
    model = train_with_symbols(tmp_path, model_type=kind, hard_vocab_limit=False)
    ours, out = load_tokenizer(model), tmp_path / "out"
    ours.save(tmp_path / "ours")
    out.mkdir()
    export_tokenizer(tmp_path / "ours", out)
    again = transformers.AutoTokenizer.from_pretrained(out)
    for text in ["a<sep>b", " <|im_start|>user", "by a river that", "<sep><sep>", *texts()[:60]]:
        assert again.encode(text, add_special_tokens=False) == ours.encode(text)


def test_an_export_with_other_ids_is_not_written(tmp_path, caplog, monkeypatch):
    model = load_tokenizer(train_with_symbols(tmp_path, model_type="bpe"))
    model.save(tmp_path / "ours")
    content = model.library_json()
    content["model"]["merges"] = content["model"]["merges"][:-5]
    monkeypatch.setattr(type(model), "library_json", lambda self: content)
    (tmp_path / "out").mkdir()
    export_tokenizer(tmp_path / "ours", tmp_path / "out")
    assert "the tokenizer is left out" in caplog.text
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("kind", "size"), [("sp_bpe", 600), ("sp_unigram", 550)])
def test_transformers_reads_an_exported_sentencepiece_model_as_we_do(tmp_path, kind, size):
    """Its own `LlamaTokenizer` of the bare model file puts a space before every text."""
    folder, out = make_tokenizer(tmp_path, size, type=kind), tmp_path / "out"
    out.mkdir()
    export_tokenizer(folder, out)
    ours, again = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(out)
    assert again.eos_token_id == ours.end_of_document
    for text in ["", " a  river\n\tthat ", "émoji 😀 \x00", *texts()[:60]]:
        ids = again.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert again.decode(ids) == text


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0}},
        {"rope_parameters": YARN | {"attention_factor": None, "mscale": None, "truncate": True}},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}},
    ],
    ids=["length left out", "nulls", "old names"],
)
def test_spellings_of_rotary_scaling(tmp_path, keys):
    """transformers reads the same file; where it leaves the length out that is the model's own."""
    model = theirs("llama")
    model.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    config = import_model(tmp_path / "theirs", tmp_path / "run")
    with torch.no_grad():
        wanted = again(tokens()).logits
    assert (our_logits(tmp_path / "run", config, 1) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_scaling_that_is_a_larger_base_is_exported_as_one():
    scaling = RotaryScalingConfig(method="ntk", factor=4.0)
    model = ModelConfig(
        vocab_size=100, norm="rmsnorm", activation="swiglu", positions="rotary", bias=False, rotary_scaling=scaling
    )
    assert family_for(plain(model)).model_type == "llama"
    assert plain(model).rotary_base == pytest.approx(10000 * 4 ** (32 / 30))
    linear = dataclasses.replace(model, rotary_scaling=RotaryScalingConfig(method="linear", beta_fast=7.0))
    assert family_for(plain(linear)).model_type == "llama"


def test_keys_that_nobody_knows_are_said(tmp_path, caplog):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/config.json"
    import_model(tmp_path / "theirs", tmp_path / "quiet")
    assert not caplog.messages
    path.write_text(json.dumps(json.loads(path.read_text()) | {"residual_multiplier": 0.5}))
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert caplog.messages == ["config.json: not used, though they may matter: residual_multiplier"]


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_tied_head_of_its_own(tmp_path):
    theirs("llama_tied").save_pretrained(tmp_path / "theirs")
    embedding = "model.embed_tokens.weight"
    change_weights(tmp_path / "theirs", lambda weights: weights.update({"lm_head.weight": weights[embedding].clone()}))
    import_model(tmp_path / "theirs", tmp_path / "run")
    change_weights(tmp_path / "theirs", lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"says tie_word_embeddings, but lm_head\.weight is not model\.embed"):
        import_model(tmp_path / "theirs", tmp_path / "other")


def test_tensors_of_several_precisions_keep_their_values(tmp_path):
    theirs("llama").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    fine = torch.rand(48, generator=torch.Generator().manual_seed(0))
    change_weights(tmp_path / "theirs", lambda weights: weights.update({"model.norm.weight": fine}))
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run/checkpoints/step_00000000", tmp_path / "out", None, None)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    for name, tensor in before.items():
        assert torch.equal(tensor.float(), after[name]), name


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "has no weight_map"),
        ({"weight_map": {"a": None}}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is not a file of the folder"),
    ],
)
def test_a_damaged_index(tmp_path, index, message):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "theirs", tmp_path / "run")


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_config_that_is_no_mapping(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="expected a mapping"):
        import_model(tmp_path, tmp_path / "run")


def test_an_output_that_cannot_be_made(tmp_path):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    with pytest.raises(ResourceError, match=r"writing .* failed"):
        import_model(tmp_path / "theirs", tmp_path / "theirs/config.json/run")


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_the_keys_that_import_prints_train_that_model(tmp_path, capsys, name):
    theirs(name).save_pretrained(tmp_path / "theirs")
    assert main(["import", f"hf={tmp_path}/theirs", f"output={tmp_path}/run"]) == 0
    keys = capsys.readouterr().out.splitlines()[-1].split()
    imported = load_run(str(tmp_path / "run"), None).config.model
    assert compose_train(["data.train=unused", *keys]).model == imported


def test_special_tokens_and_settings_come_back(tmp_path):
    """What an import reads of a folder an export gives back: ids, generation, chat template."""
    config = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 3}
    generation = {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 5]}
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}", "model_max_length": 77}
    source = tmp_path / "theirs"
    theirs("llama").save_pretrained(source)
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | config))
    (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = make_tokenizer(tmp_path)
    export_tokenizer(tokenizer, source)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["import", f"hf={source}", f"output={tmp_path}/run"]) == 0
    assert main(["export", f"run_dir={tmp_path}/run", f"output={tmp_path}/out"]) == 0
    read = {name: json.loads((tmp_path / "out" / name).read_text()) for name in
            ("config.json", "generation_config.json", "tokenizer_config.json")}  # fmt: skip
    assert {key: read["config.json"][key] for key in config} == config
    assert read["generation_config.json"] == generation
    assert read["tokenizer_config.json"] == settings
    # Another tokenizer takes its place: the settings are not those of this one.
    shutil.rmtree(tmp_path / "run/tokenizer")
    shutil.copytree(make_tokenizer(tmp_path / "run", 500), tmp_path / "other")
    assert main(["export", f"run_dir={tmp_path}/run", f"output={tmp_path}/again"]) == 0
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text())["eos_token"] == "</s>"
    end = load_tokenizer(tmp_path / "run/tokenizer").end_of_document
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "again" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (end, end), name
    assert "chat_template" not in json.loads((tmp_path / "again/tokenizer_config.json").read_text())


def test_special_tokens_of_a_run_of_ours(tmp_path):
    theirs("llama").save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    tokenizer = make_tokenizer(tmp_path)
    export_model(tmp_path / "run/checkpoints/step_00000000", tmp_path / "out", None, tokenizer)
    end = load_tokenizer(tokenizer).end_of_document
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (end, end)


def test_a_sentencepiece_model_that_transformers_would_misread_is_left_out(tmp_path, caplog):
    (tmp_path / "out").mkdir()
    export_tokenizer(make_tokenizer(tmp_path, 200, byte_fallback=False), tmp_path / "out")
    assert "the tokenizer is left out" in caplog.text
    assert not list((tmp_path / "out").iterdir())


def test_which_checkpoint_is_exported(tmp_path, capsys):
    assert main(["export", f"output={tmp_path}/out"]) == ConfigError.exit_code
    assert "give one of run_dir=DIR" in capsys.readouterr().err
    assert main(["export", f"run_dir={tmp_path}", f"output={tmp_path}/out"]) == CheckpointError.exit_code
    assert "holds no checkpoint yet" in capsys.readouterr().err
