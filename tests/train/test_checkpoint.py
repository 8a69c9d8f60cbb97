"""Checkpoints: complete or absent, whatever fails; resuming sees the last good one and cuts the log back to
it.
"""

import json
import os

import pytest
import torch

from glmx.errors import CheckpointError, ConfigError
from glmx.train import checkpoint


def write(out, step, keep=2, save_model=None, tensors=None):
    def default(path):
        path.mkdir()
        (path / "config.json").write_text("{}")

    return checkpoint.write(
        out,
        step,
        save_model=save_model or default,
        tensors=tensors or {"master.w": torch.full((3,), float(step))},
        state={"tokens": step * 10, "seconds": 1.5, "updates": step, "cursor": {}, "config": {}},
        keep=keep,
    )


def names(out):
    return sorted(p.name for p in out.iterdir())


def test_round_trip_latest_and_keep(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]
    saved = checkpoint.read(checkpoint.latest(tmp_path))
    assert saved.state["step"] == 3 and saved.state["tokens"] == 30
    assert torch.equal(saved.tensors["master.w"], torch.full((3,), 3.0))
    assert (saved.path / "config.json").read_text() == "{}"
    modes = {path.stat().st_mode for path in saved.path.rglob("*") if path.is_file()}
    assert len(modes) == 1, "another user, who may read the config, may read the tensors"


def test_the_same_step_can_be_written_again(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 5, tensors={"master.w": torch.zeros(1)})
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert checkpoint.read(tmp_path / "step-00000005").tensors["master.w"].numel() == 1


@pytest.mark.parametrize("fails_in", ["model", "tensors", "sync", "rename"])
def test_a_failed_write_leaves_the_last_good_one(tmp_path, monkeypatch, fails_in):
    write(tmp_path, 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def half_a_model(path):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        full()

    if fails_in == "tensors":
        monkeypatch.setattr(checkpoint, "save_file", full)
    elif fails_in == "sync":
        monkeypatch.setattr(checkpoint, "_sync_tree", full)
    elif fails_in == "rename":
        monkeypatch.setattr(checkpoint.Path, "rename", full)
    with pytest.raises(CheckpointError, match="step-00000002.*No space left"):
        write(tmp_path, 2, save_model=half_a_model if fails_in == "model" else None)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_killed_between_rename_and_latest(tmp_path, monkeypatch):
    write(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(checkpoint, "_write_latest", lambda *_: 1 / 0)
        write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    write(tmp_path, 2)
    assert checkpoint.latest(tmp_path).name == "step-00000002"


def test_leftovers_of_a_kill_are_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002" / "trainer").mkdir(parents=True)
    (tmp_path / ".tmp-latest").write_text("step-0")
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_log_is_cut_back_to_the_step(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"step": 1}, {"step": 2}, {"step": 2, "heldout_bpb": 3.0}, {"step": 3}]
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 2, "torn')
    checkpoint.cut_log(log, 2)
    assert [json.loads(line) for line in log.read_text().splitlines()] == records[:3]
    log.write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}))  # the last line lacks its end
    checkpoint.cut_log(log, 2)
    assert log.read_text() == '{"step": 1}\n'
    checkpoint.cut_log(tmp_path / "none.jsonl", 2)


def test_errors_name_the_path(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "latest").write_text("step-00000009\n")
    with pytest.raises(CheckpointError, match="names 'step-00000009', which is not in .*; it has no checkpoint"):
        checkpoint.latest(tmp_path)
    path = write(tmp_path, 9)
    (path / "trainer" / "state.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="step-00000009/trainer/state.safetensors cannot be resumed"):
        checkpoint.read(path)
    for content, words in (
        (b"{", "cannot be resumed: Expecting"),
        (b"\xff", "cannot be resumed: 'utf-8'"),
        (b"[1]", "expected an object, got list"),
        (b'{"format": 1, "step": 9}', "has format 1, this glmx resumes format 2"),
        (b'{"format": 2, "step": "9"}', "step is '9', expected int"),
        (b'{"format": 2, "step": 8, "tokens": 1, "seconds": 1, "updates": 8, "cursor": {}, "config": {}}', "of step 8"),
    ):
        (path / "trainer" / "state.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"step-00000009/trainer/state.json.*{words}"):
            checkpoint.read(path)


def test_what_a_failed_start_made_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoint.making(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        1 / 0  # noqa: B018
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="out is '.*file/b': cannot write there: (Not a directory|File exists)"),
        checkpoint.making(tmp_path / "file" / "b"),
    ):
        raise AssertionError
    with checkpoint.making(tmp_path / "kept"):
        pass
    assert names(tmp_path) == ["file", "kept"]


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    handle = checkpoint.lock(tmp_path)
    with pytest.raises(CheckpointError, match="another process is training in"):
        checkpoint.lock(tmp_path)
    os.close(handle)
    os.close(checkpoint.lock(tmp_path))
