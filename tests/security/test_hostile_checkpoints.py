"""S1, S3: files made to harm, with every digest right: refused with a `CheckpointError`, and nothing of them runs.

Whoever can write a checkpoint can write its digests too, so the reading itself must be safe.
"""

import dataclasses
import io
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from megalite.checkpoint import load_model
from megalite.checkpoint_folder import choose_checkpoint, commit, create_temporary, newest_checkpoint
from megalite.checkpoint_format import KINDS, FileEntry, Manifest, read_manifest, write_file, write_manifest
from megalite.config.compose import config_values
from megalite.errors import CheckpointError
from megalite.mesh import single_mesh
from megalite.models import build_model, materialize, named_logical_parameters
from tests.runs import tiny_config
from tests.security.hostile import Payload, foreign_files, refused

CONFIG = tiny_config("unused", model={"num_layers": 1, "hidden_size": 32, "max_sequence_length": 32, "vocab_size": 300})


def model():
    built = build_model(CONFIG.model, single_mesh(torch.device("cpu")))
    materialize(built, single_mesh(torch.device("cpu")), seed=1)
    return built


@pytest.fixture(scope="module")
def tensors():
    parameters = named_logical_parameters(model())
    return {name: torch.zeros(parameter.shard.shape) for name, parameter in parameters}


def write(checkpoints: Path, contents: dict[str, bytes], tensors, **changes) -> Path:
    """A checkpoint with these files' contents and digests that fit them."""
    temporary = create_temporary(checkpoints, 5)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    entries = [
        FileEntry(f"{kind}-{n:05d}.safetensors", kind, len(contents[kind]),
                  write_file(temporary, f"{kind}-{n:05d}.safetensors", contents[kind]), shapes)
        for n, kind in enumerate(KINDS)
    ]  # fmt: skip
    values = dict(
        step=5, samples_consumed=40, tokens_seen=0, skipped_steps=0, skipped_in_a_row=0, optimizer_step=5,
        loss_scaler={}, seed=7, config=config_values(CONFIG), stores=["x"], topology={}, versions={}, files=entries,
    )  # fmt: skip
    return commit(temporary, Manifest(**values | changes))


def header(values, length=None) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def hostile_files(canary, whole):
    """Name -> content, of a file that should be safetensors."""
    torch_zip = io.BytesIO()
    torch.save({"x": Payload(canary)}, torch_zip)
    first = next(iter(json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])))
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return foreign_files(canary) | {
        "what torch saves": torch_zip.getvalue(),
        "a header of a terabyte": struct.pack("<Q", 1 << 40) + b"{}",
        "a header of 2^64": struct.pack("<Q", 2**64 - 1) + b"{}",
        "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
        "a header that is a list": header([1]),
        "a header that is deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "a tensor of 2^60": header({first: entry | {"shape": [1 << 60], "data_offsets": [0, 1 << 62]}}),
        "a shape that overflows": header({first: entry | {"shape": [1 << 32, 1 << 32]}}) + bytes(8),
        "a negative shape": header({first: entry | {"shape": [-2]}}) + bytes(8),
        "offsets the wrong way round": header({first: entry | {"data_offsets": [8, 0]}}) + bytes(8),
        "offsets beyond the end": header({first: entry | {"data_offsets": [0, 4096]}}) + bytes(8),
        "tensors that overlap": header({first: entry, "other": entry}) + bytes(8),
        "bytes of nobody": header({first: entry}) + bytes(4096),
        "an unknown type": header({first: entry | {"dtype": "OBJECT"}}) + bytes(8),
        "another tensor's name": header({"other": entry}) + bytes(8),
        "another shape": header({first: entry}) + bytes(8),
        "the right file, cut": whole[:-5],
    }


def test_hostile_tensor_files_are_refused(tmp_path, tensors):
    canary = tmp_path / "canary"
    whole = save(tensors)
    built = model()
    assert refused(lambda: load_model(built, write(tmp_path / "good", dict.fromkeys(KINDS, whole), tensors),
                                      single_mesh(torch.device("cpu")))) == 7, "a good one loads"  # fmt: skip
    for number, (name, content) in enumerate(hostile_files(canary, whole).items()):
        contents = dict.fromkeys(KINDS, whole) | {"weight": content}
        folder = write(tmp_path / str(number), contents, tensors)
        choose_checkpoint(str(folder), tmp_path)  # digests fit: it is the reading that must refuse
        code = refused(lambda folder=folder: load_model(built, folder, single_mesh(torch.device("cpu"))))
        assert code == 0, f"{name}: {code}"
        assert not canary.exists(), name


def test_hostile_names_reach_nothing_outside(tmp_path, tensors):
    """S3: the manifest's own digest is right, its names are not; and files that are links to elsewhere."""
    whole = save(tensors)
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(whole)
    folder = write(tmp_path / "run/checkpoints", dict.fromkeys(KINDS, whole), tensors)
    good = read_manifest(folder)
    names = ["../../../secret.safetensors", str(secret), "weight-00000.safetensors/../../../../secret.safetensors",
             "weight-00000.safetensors\0.txt", "a" * 300, "", ".", "..", "~/x", "$HOME/x", "weight-00000.pkl",
             "weight-00000.safetensors\n", "WEIGHT-00000.safetensors", "weight-0.safetensors",
             "./weight-00000.safetensors", "//weight-00000.safetensors", "file:///etc/passwd",
             "weight-٠٠٠٠٠.safetensors"]  # fmt: skip
    for name in names:
        files = [dataclasses.replace(good.files[0], name=name), *good.files[1:]]
        write_manifest(folder, dataclasses.replace(good, files=files))
        with pytest.raises(CheckpointError):
            newest_checkpoint(tmp_path / "run")
    write_manifest(folder, good)
    path = folder / good.files[0].name
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link"):
        newest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{", b"[" * 100_000, b'{"format_version": 1e999}', b'{"format_version": 1}', b"\xff\xfe\0",
     b'{"format_version": 1, "digest": "x", "files": [{"__class__": "os.system"}]}', pickle.dumps({"a": 1}),
     b"{" + b'"a":' * 50_000, b'{"format_version": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_hostile_manifests(tmp_path, content):
    folder = tmp_path / "run/checkpoints/step_00000005"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        newest_checkpoint(tmp_path / "run")
