import dataclasses
import json
import math
import time

import pytest
import xxhash

from megalite import checkpoint_folder, checkpoint_format
from megalite.checkpoint_folder import (
    checkpoint_name,
    choose_checkpoint,
    commit,
    create_temporary,
    list_checkpoints,
    newest_checkpoint,
    prune,
    require_checkpoint,
)
from megalite.checkpoint_format import (
    KINDS,
    FileEntry,
    Manifest,
    read_manifest,
    verify_file,
    write_file,
    write_manifest,
)
from megalite.config.schema import CheckpointConfig
from megalite.data import files
from megalite.errors import CheckpointError
from megalite.guard.goodput import GoodputClock


def manifest(step, files=(), **changes):
    values = dict(
        step=step, samples_consumed=32 * step, tokens_seen=1000 * step, skipped_steps=1,
        skipped_in_a_row=0, optimizer_step=step - 1,
        loss_scaler={"cur_scale": 2.0}, seed=7, config={"seed": 7}, stores=["abc"], topology={"tensor": 2},
        versions={"torch": "2"},
        files=list(files),
    )  # fmt: skip
    return Manifest(**values | changes)


def save(checkpoints, step, content=b"tensors"):
    """A checkpoint with a file of each kind."""
    temporary = create_temporary(checkpoints, step)
    entries = []
    for number, kind in enumerate(KINDS):
        name, data = f"{kind}-{number:05d}.safetensors", content + kind.encode()
        entries.append(FileEntry(name, kind, len(data), write_file(temporary, name, data), {"embedding": [3, 2]}))
    return commit(temporary, manifest(step, entries))


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def checkpoints(run_dir):
    return run_dir / "checkpoints"


@pytest.fixture
def warnings(monkeypatch):
    """Messages that were logged as warnings."""
    messages = []
    monkeypatch.setattr(checkpoint_folder.log, "warning", lambda text, *values: messages.append(text % values))
    return messages


def test_what_is_saved_is_what_is_read(checkpoints):
    folder = save(checkpoints, 100)
    assert folder == checkpoints / "step_00000100" == checkpoints / checkpoint_name(100)
    read = read_manifest(folder)
    assert read == manifest(100, read.files)
    assert [entry.kind for entry in read.files] == list(KINDS)
    assert read.files[0].digest == xxhash.xxh3_128_hexdigest(b"tensorsweight")
    for entry in read.files:
        verify_file(folder, entry)
    assert read.location("exp_avg", "embedding") == "exp_avg-00001.safetensors"
    with pytest.raises(CheckpointError, match="step 100 holds no weight of head"):
        read.location("weight", "head")
    assert (checkpoints / "latest").read_text() == "step_00000100"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step_00000100"]


@pytest.mark.parametrize("failing", ["write_manifest", "sync_directory"])
def test_an_interrupted_save_is_no_checkpoint_and_leaves_the_last_one(checkpoints, run_dir, monkeypatch, failing):
    first = save(checkpoints, 10)
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")

    temporary = create_temporary(checkpoints, 20)
    monkeypatch.setattr(checkpoint_folder, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        commit(temporary, manifest(20))
    assert calls
    assert list_checkpoints(checkpoints) == [first]
    assert newest_checkpoint(run_dir) == first


def test_the_final_name_appears_only_when_everything_is_there(checkpoints, monkeypatch):
    """The order of a commit: manifest, sync, rename; a reader never sees the name without its content."""
    temporary = create_temporary(checkpoints, 5)
    seen = []
    real = files.sync_directory

    def watch(folder):
        seen.append((folder.name, (temporary / "manifest.json").is_file(), (checkpoints / "step_00000005").exists()))
        real(folder)

    for room in (files, checkpoint_folder):
        monkeypatch.setattr(room, "sync_directory", watch)
    commit(temporary, manifest(5))
    assert seen == [(temporary.name, True, False), *[("checkpoints", False, True)] * 2]


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints):
    save(checkpoints, 10, b"old")
    folder = save(checkpoints, 10, b"new!")
    for entry in read_manifest(folder).files:
        verify_file(folder, entry)
    assert (folder / "weight-00000.safetensors").read_bytes() == b"new!weight"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step_00000010"]


def test_prune_keeps_the_newest_and_clears_what_interrupted_saves_left(checkpoints):
    folders = [save(checkpoints, step) for step in (5, 100, 20, 99_999_999, 100_000_000)]
    (create_temporary(checkpoints, 30) / "weight-00000.safetensors").write_bytes(b"half")
    kept = [checkpoints / name for name in ("notes.txt", "step_mine", "step_00000007.bak")]
    for path in kept:
        path.mkdir()
    prune(checkpoints, CheckpointConfig(keep=2))
    assert list_checkpoints(checkpoints) == [folders[3], folders[4]]
    assert sorted(checkpoints.iterdir()) == sorted([*kept, folders[3], folders[4], checkpoints / "latest"])
    prune(checkpoints, CheckpointConfig(keep=5))
    assert list_checkpoints(checkpoints) == [folders[3], folders[4]]


def test_only_whole_directories_with_the_name_are_listed(checkpoints):
    assert list_checkpoints(checkpoints) == []
    folder = save(checkpoints, 10)
    create_temporary(checkpoints, 20)
    (checkpoints / "step_00000030").mkdir()  # no manifest
    (checkpoints / "step_00000040").write_text("a file")
    for name in ("step_50", "step_0000005x", "xstep_00000050", "step_00000050.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "manifest.json").write_text("{}")
    assert list_checkpoints(checkpoints) == [folder]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def zero_a_page(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(len(data[middle : middle + 4096]))
    path.write_bytes(data)


def gone(path):
    path.unlink()


def swapped(path):
    """With the file of another kind, of the same size."""
    other = next(p for p in sorted(path.parent.glob("*.safetensors")) if p != path)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def of_another_run(path):
    path.write_bytes(path.read_bytes()[::-1])


DAMAGES = [cut, cut_to_half, grow, flip, zero_a_page, empty, gone, of_another_run]
SIZE = "bytes, the manifest says"
SAYS = {cut: SIZE, cut_to_half: SIZE, grow: SIZE, flip: "its digest is", zero_a_page: "its digest is",
        gone: "is missing", empty: "found 0 bytes", of_another_run: "its digest is"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file(checkpoints, kind, damage):
    folder = save(checkpoints, 10)
    entry = next(entry for entry in read_manifest(folder).files if entry.kind == kind)
    damage(folder / entry.name)
    with pytest.raises(CheckpointError, match=f"{entry.name}.*{SAYS[damage]}"):
        verify_file(folder, entry)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["manifest.json", "weight-00000.safetensors", "exp_avg_sq-00002.safetensors"])
def test_a_damaged_newest_falls_back_with_one_warning(run_dir, checkpoints, warnings, damage, file):
    older, newest = save(checkpoints, 10), save(checkpoints, 20)
    assert newest_checkpoint(run_dir) == newest
    damage(newest / file)
    assert newest_checkpoint(run_dir) == older
    assert len(warnings) == 1
    assert file in warnings[0]
    assert warnings[0].endswith("; falling back to step_00000010")


def test_files_that_changed_places_and_a_manifest_of_another_step(run_dir, checkpoints, warnings):
    older, newest = save(checkpoints, 10), save(checkpoints, 20)
    swapped(newest / "weight-00000.safetensors")
    assert newest_checkpoint(run_dir) == older
    swapped(newest / "weight-00000.safetensors")
    assert newest_checkpoint(run_dir) == newest
    (newest / "manifest.json").write_bytes((older / "manifest.json").read_bytes())
    assert newest_checkpoint(run_dir) == older
    assert "is of step 10" in warnings[-1]


def test_none_whole_is_an_error_and_none_at_all_is_not(run_dir, checkpoints, warnings):
    assert newest_checkpoint(run_dir) is None
    assert choose_checkpoint("auto", run_dir) is None
    for step in (10, 20):
        flip(save(checkpoints, step) / "weight-00000.safetensors")
    for choose in (newest_checkpoint, lambda run: choose_checkpoint("auto", run)):
        with pytest.raises(
            CheckpointError, match=r"and no whole checkpoint \(.*its digest is.*\); .*checkpoint\.resume=never"
        ):
            choose(run_dir)
    assert choose_checkpoint("never", run_dir) is None


def test_a_named_checkpoint_is_taken_or_refused_but_never_exchanged(run_dir, checkpoints, tmp_path):
    older, newest = save(checkpoints, 10), save(checkpoints, 20)
    assert choose_checkpoint("auto", run_dir) == newest
    assert choose_checkpoint(str(older), run_dir) == older
    flip(newest / "exp_avg-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"exp_avg-00001\.safetensors: its digest is"):
        choose_checkpoint(str(newest), run_dir)
    with pytest.raises(CheckpointError, match="is not a checkpoint: it has no manifest"):
        choose_checkpoint(str(tmp_path / "gone"), run_dir)
    with pytest.raises(CheckpointError, match="is not a checkpoint: it has no manifest"):
        choose_checkpoint(str(run_dir), run_dir)


NAMES = ["../x.safetensors", "/etc/passwd", "a/b-00000.safetensors", "weight-00000.pt", "", ".", "weight-0.safetensors",
         "weight-00000.safetensors\n", "weight-00000.safetensors/../../x"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_no_file_elsewhere(checkpoints, name):
    folder = save(checkpoints, 10)
    read = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(read, files=[dataclasses.replace(read.files[0], name=name)]))
    with pytest.raises(CheckpointError, match="which is not a file of a checkpoint"):
        read_manifest(folder)


def test_a_kind_that_is_not_known(checkpoints):
    folder = save(checkpoints, 10)
    read = read_manifest(folder)
    write_manifest(folder, dataclasses.replace(read, files=[dataclasses.replace(read.files[0], kind="pickle")]))
    with pytest.raises(CheckpointError, match="which is not a file of a checkpoint"):
        read_manifest(folder)


def test_another_format_version(checkpoints):
    folder = save(checkpoints, 10)
    write_manifest(folder, manifest(10, format_version=2))
    with pytest.raises(CheckpointError, match="format version 2, this MegaLite reads 1"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(step=11),
        lambda values: values["files"][0].update(digest="0" * 32),
        lambda values: values["files"].pop(),
        lambda values: values["config"].update(seed=8),
        lambda values: values.update(surprise=1),
        lambda values: values.update(digest="0" * 32),
        *(lambda values, key=key: values.pop(key) for key in ("digest", "step", "files", "format_version")),
    ],
)
def test_a_changed_manifest(checkpoints, change):
    folder = save(checkpoints, 10)
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_every_flipped_bit_of_a_manifest_is_found_or_means_nothing(checkpoints):
    folder = save(checkpoints, 10)
    read, path = read_manifest(folder), folder / "manifest.json"
    data = path.read_bytes()
    found = 0
    for position in range(0, 8 * len(data), 37):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert read_manifest(folder) == read, "a space for another, say"
        except CheckpointError:
            found += 1
    assert found > 100


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"7", b'"x"'])
def test_a_manifest_that_is_no_manifest(checkpoints, content):
    folder = save(checkpoints, 10)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_the_manifest_is_plain_json(checkpoints):
    values = json.loads((save(checkpoints, 10) / "manifest.json").read_text())
    assert set(values) == {"digest", *(field.name for field in dataclasses.fields(Manifest))}
    assert set(values["files"][0]) == {field.name for field in dataclasses.fields(FileEntry)}


def test_a_run_that_had_checkpoints_does_not_start_over_in_silence(run_dir, checkpoints):
    folder = save(checkpoints, 10)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds latest, step_00000010 and no whole checkpoint .*no manifest"):
        newest_checkpoint(run_dir)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    with pytest.raises(CheckpointError, match=r"holds latest and no whole checkpoint; restore one, or start over"):
        newest_checkpoint(run_dir)
    (checkpoints / "latest").rename(checkpoints / "latest.tmp")  # what a first save that was killed may leave
    create_temporary(checkpoints, 20)
    assert newest_checkpoint(run_dir) is None


def test_a_run_whose_checkpoints_were_taken_away_does_not_start_over_in_silence(run_dir):
    run_dir.mkdir(exist_ok=True)
    clock = GoodputClock(time.time(), run_dir / "goodput.jsonl")
    clock.mark(5)
    assert newest_checkpoint(run_dir) is None, "it died before its first save"
    clock.mark(12, saved_step=10)
    with pytest.raises(CheckpointError, match=r"has saved step 10, says goodput\.jsonl, and .* holds no checkpoint"):
        newest_checkpoint(run_dir)
    again = GoodputClock(time.time(), run_dir / "goodput.jsonl")
    again.begin(0)
    again.mark(3)
    assert newest_checkpoint(run_dir) is None, "with checkpoint.resume=never, and died before its first save"


def test_a_newest_that_the_disk_does_not_give_falls_back(run_dir, checkpoints, warnings, monkeypatch):
    older, newest = save(checkpoints, 10), save(checkpoints, 20)
    digest = checkpoint_format.digest_file

    def read(path):
        if path.parent == newest:
            raise OSError(5, "Input/output error")
        return digest(path)

    monkeypatch.setattr(checkpoint_format, "digest_file", read)
    assert newest_checkpoint(run_dir) == older
    assert "cannot be read: [Errno 5] Input/output error" in warnings[0]


@pytest.mark.parametrize("resume", ["never", "elsewhere"])
def test_a_command_that_is_given_again_goes_on_whatever_it_began_from(run_dir, checkpoints, tmp_path, resume):
    elsewhere = save(tmp_path / "other/checkpoints", 7)
    resume = str(elsewhere) if resume == "elsewhere" else resume
    save(checkpoints, 10)
    begins = None if resume == "never" else elsewhere
    assert choose_checkpoint(resume, run_dir) == begins, "another command wrote what is there"
    config = {"checkpoint": {"resume": resume}, "trainer": {"steps": 30}}
    folder = commit(create_temporary(checkpoints, 20), manifest(20, config=config))
    assert choose_checkpoint(resume, run_dir) == folder
    assert require_checkpoint(str(elsewhere), run_dir) == elsewhere, "an evaluation takes what it is told to"
    commit(create_temporary(checkpoints, 30), manifest(30, config=config))
    assert choose_checkpoint(resume, run_dir) == begins, "it has reached its end"


@pytest.mark.parametrize("failing", ["write_manifest", "put_in_place", "_name_latest"])
def test_a_commit_is_gone_on_with(checkpoints, run_dir, monkeypatch, failing):
    temporary = create_temporary(checkpoints, 20)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_folder, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        commit(temporary, manifest(20))
    monkeypatch.undo()
    assert commit(temporary, manifest(20)) == newest_checkpoint(run_dir)
    assert (checkpoints / "latest").read_text() == "step_00000020"


def steps(checkpoints):
    return [int(folder.name[5:]) for folder in list_checkpoints(checkpoints)]


def save_evaluated(checkpoints, step, loss=None, ephemeral=False):
    evaluation = {} if loss is None else {"eval/a/loss": loss, "eval/b/loss": 2 * loss, "eval/a/perplexity": 1 / loss}
    entry = manifest(step, evaluation=evaluation, ephemeral=ephemeral)
    return commit(create_temporary(checkpoints, step), entry)


def test_what_is_kept(checkpoints):
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, None)]:
        save_evaluated(checkpoints, step, loss)
    save_evaluated(checkpoints, 55, ephemeral=True)
    prune(checkpoints, CheckpointConfig(keep=2, keep_every=30, keep_best=True))
    assert steps(checkpoints) == [20, 30, 40, 50, 55], "the best, the multiples, the last two, and the newest of all"
    prune(checkpoints, CheckpointConfig(keep=2, keep_best=True))
    assert steps(checkpoints) == [20, 40, 50, 55]
    save_evaluated(checkpoints, 57, math.nan)
    prune(checkpoints, CheckpointConfig(keep=1, keep_best=True))
    assert steps(checkpoints) == [20, 57], "what is no number is not the best"
    save_evaluated(checkpoints, 58, ephemeral=True)
    prune(checkpoints, CheckpointConfig(keep=1))
    assert steps(checkpoints) == [57, 58], "an ephemeral one goes when a newer one is there"


def test_what_cannot_be_read_is_not_removed(checkpoints):
    folders = [save_evaluated(checkpoints, step) for step in (10, 20, 30)]
    flip(folders[0] / "manifest.json")
    prune(checkpoints, CheckpointConfig(keep=1))
    assert steps(checkpoints) == [10, 30]


def test_a_removal_that_is_killed_leaves_nothing_under_a_checkpoints_name(checkpoints, monkeypatch):
    for step in (10, 20):
        save_evaluated(checkpoints, step)
    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoints, CheckpointConfig(keep=1))
    assert steps(checkpoints) == [20]
    monkeypatch.undo()
    prune(checkpoints, CheckpointConfig(keep=1))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000020"]
