"""A run that was killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quire.__main__ import execute
from quire.checkpoint import WholeFiles, read

ROOT = Path(__file__).parents[2]
STEPS = 27  # two and a half epochs of ten batches; a multiple of 3, so that the end is saved

NOISY = {  # random masks, dropped residual branches, random cuts, a schedule, an optimizer with state
    "model": {
        "encoder": {
            "class_path": "ViTEncoder",
            "init_args": {"patch": 4, "width": 16, "depth": 2, "heads": 2, "drop_path": 0.3},
        },
        "decoder": {"class_path": "GridDecoder", "init_args": {"width": 16, "depth": 1, "heads": 2}},
        "objective": {"class_path": "MaskedReconstruction", "init_args": {"masking": 0.5}},
    },
    "data": {"class_path": "SampleImages", "init_args": {"size": 16, "length": 80, "batch_size": 8, "num_workers": 0}},
    "trainer": {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
    },
}
SAVING = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 3, "save_last": True}}


def config(*accidents: dict[str, Any]) -> str:
    """Written to ``noisy.yaml``; returns its name."""
    trainer = {**NOISY["trainer"], "callbacks": [SAVING, *accidents]}
    Path("noisy.yaml").write_text(yaml.safe_dump({**NOISY, "trainer": trainer}))
    return "noisy.yaml"


def accident(step: int, soft: bool = False, writing: bool = False) -> dict[str, Any]:
    name = "AccidentWhileWriting" if writing else "Accident"
    return {"class_path": f"tests.faults.accidents.{name}", "init_args": {"step": step, "soft": soft}}


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as handle:
        return list(csv.DictReader(handle))


def final(folder: str = "runs/noisy") -> dict[str, Any]:
    """The last checkpoint of the newest version."""
    versions = sorted(Path(folder).glob("version_*"), key=lambda p: int(p.name.partition("_")[2]))
    return read(versions[-1] / "checkpoints/last.ckpt")


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(resumed: dict[str, Any], whole: dict[str, Any], note: str) -> None:
    assert resumed["global_step"] == whole["global_step"], note
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(resumed[part], whole[part]), f"{part} differs: {note}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        assert execute(["fit", "-c", config()]) == 0
        return final()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def killed(*accidents: dict[str, Any]) -> None:
    """Run in a process of its own until it is killed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "quire", "fit", "-c", config(*accidents)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_at_a_random_step_changes_nothing(here: Path, whole: dict[str, Any]) -> None:
    step = random.SystemRandom().randrange(3, STEPS)  # every step must hold, so none is chosen by hand
    killed(accident(step))
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 0
    assert_same_end(final(), whole, f"killed before step {step}")


@pytest.mark.parametrize("step", [3, 5, 10, 11, 13, 20, 24])
def test_a_crash_in_any_part_of_an_epoch_changes_nothing(step: int, here: Path, whole: dict[str, Any]) -> None:
    assert execute(["fit", "-c", config(accident(step, soft=True))]) == 1
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 0
    assert_same_end(final(), whole, f"crashed before step {step}")


def test_two_crashes_in_a_row_change_nothing(here: Path, whole: dict[str, Any]) -> None:
    for step in (7, 16):
        last = ["--ckpt_path", "last"] if step > 7 else []
        assert execute(["fit", "-c", config(accident(step, soft=True)), *last]) == 1
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 0
    assert_same_end(final(), whole, "crashed before steps 7 and 16")


def test_a_run_that_ended_inside_an_epoch_can_be_made_longer(here: Path) -> None:
    constant = ["--model.schedule", "Constant"]
    assert execute(["fit", "-c", config(), *constant]) == 0
    straight = final()
    assert execute(["fit", "-c", config(), *constant, "--trainer.max_steps", "14"]) == 0
    assert execute(["fit", "-c", config(), *constant, "--ckpt_path", "last"]) == 0
    assert_same_end(final(), straight, "ended at step 14")


def test_loader_processes_change_nothing(here: Path, whole: dict[str, Any]) -> None:
    workers = ["--data.num_workers", "2"]
    assert execute(["fit", "-c", config(accident(8, soft=True)), *workers]) == 1
    assert execute(["fit", "-c", config(), "--ckpt_path", "last", *workers]) == 0
    assert_same_end(final(), whole, "two loader processes, crashed before step 8")


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(here: Path, whole: dict[str, Any]) -> None:
    killed(accident(9, writing=True))
    found = list(Path("runs/noisy/version_0/checkpoints").glob("*.ckpt"))
    assert found
    assert all(read(file)["global_step"] == 6 for file in found)  # the one of step 9 was never there
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 0
    assert_same_end(final(), whole, "killed while the checkpoint of step 9 was written")


def test_a_broken_newest_checkpoint_is_passed_over_and_said(
    here: Path, whole: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert execute(["fit", "-c", config(accident(8, soft=True))]) == 1
    folder = Path("runs/noisy/version_0/checkpoints")
    for name, share in (("a.ckpt", 2), ("b.ckpt", 3)):
        content = (folder / "last.ckpt").read_bytes()
        (folder / name).write_bytes(content[: len(content) // share])
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 0
    assert "passed over" in (err := capfd.readouterr().err) and "b.ckpt is not a checkpoint, or is truncated" in err
    assert_same_end(final(), whole, "two broken files beside the good one")


def test_only_broken_checkpoints_are_an_error(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/noisy/version_0/checkpoints")
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"PK\3\4 half")
    assert execute(["fit", "-c", config(), "--ckpt_path", "last"]) == 2
    assert "no checkpoint under runs/noisy that can be read" in capfd.readouterr().err


def test_a_resumed_run_logs_what_the_whole_run_logs(here: Path, whole: dict[str, Any]) -> None:
    assert execute(["fit", "-c", config()]) == 0
    assert execute(["fit", "-c", config(accident(14, soft=True))]) == 1
    assert execute(["fit", "-c", config(), "--ckpt_path", "runs/noisy/version_1/checkpoints/last.ckpt"]) == 0
    logs = [rows(Path(f"runs/noisy/version_{i}/metrics.csv")) for i in (0, 2)]
    first = int(logs[1][0]["step"])
    assert first == 14  # the mean over steps 10 to 14, of which 10 and 11 lie before the checkpoint
    assert logs[1] == [row for row in logs[0] if int(row["step"]) >= first]


def test_a_checkpoint_is_renamed_into_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep/model.ckpt"
    writer = WholeFiles()
    writer.save_checkpoint({"a": 1}, target)
    before = target.read_bytes()

    def cut(content: Any, handle: Any) -> None:
        handle.write(before[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(OSError, match="no space"):
        writer.save_checkpoint({"a": 2}, target)
    assert target.read_bytes() == before
    shutil.rmtree(target.parent)
