"""A disk that is full: a real one, small and in memory."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from teachercache.training.checkpoints.completion import complete_checkpoints
from teachercache.training.checkpoints.disk import out_of_space
from teachercache.training.job.train import run_training
from training.runs import log_of, start_job


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many kB, or makes it as large."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        remount = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={kilobytes}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs a file system of its own: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _torch_zip(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, str(path))


def _torch_legacy(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _python(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.write_bytes(state["weights"].numpy().tobytes())


def _safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, path)


@pytest.mark.parametrize("write", [_torch_zip, _torch_legacy, _python, _safetensors])
@pytest.mark.parametrize("left_kb", [64, 0])
def test_a_full_disk_is_known_whoever_writes(small_disk: Callable[[int], Path], write: Any, left_kb: int) -> None:
    folder = small_disk(256)
    (folder / "before").write_bytes(bytes((256 - left_kb) * 1024))
    with pytest.raises(Exception) as caught:
        write(folder / "after", {"weights": torch.zeros(100_000)})
    assert out_of_space(caught.value)


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), RuntimeError("shape"), PermissionError(13, "no")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not out_of_space(error)
    shared = RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
    assert not out_of_space(shared)


def test_a_disk_that_fills_at_a_checkpoint(
    small_disk: Callable[[int], Path], make_recipe: Any, plain_student: Path, tmp_path: Path
) -> None:
    """Room for two checkpoints and a half; keeping them all."""
    settings = {"save_every": 3, "evaluate_every": 9, "keep_checkpoints": 9, "student_model": plain_student}
    whole = make_recipe(output=tmp_path / "whole", **settings)
    run_training(whole)
    sizes = [path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-3").rglob("*") if path.is_file()]
    recipe = make_recipe(output=small_disk(sum(sizes) * 5 // 2048) / "run", **settings)
    job = start_job(recipe, tmp_path)
    errors, run = job.communicate()[1], recipe.train.output
    lines = [line for line in errors.splitlines() if not line.startswith("step ")]
    assert job.returncode == 1 and lines == [
        f"error: {run}: its disk takes no more, the space or a quota is used up ({_free(run)} MB free); free some and run the "
        "same command again: it goes on from the last whole checkpoint"
    ]
    assert [checkpoint.step for checkpoint in complete_checkpoints(run)] == [3, 6]
    small_disk(100_000)
    assert run_training(recipe)["resumed_from"] == 6
    assert log_of(run) == log_of(whole.train.output)


def _free(folder: Path) -> str:
    import shutil

    return f"{shutil.disk_usage(folder).free / 1e6:,.1f}"
