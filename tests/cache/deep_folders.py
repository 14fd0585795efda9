"""Folders in each other, deeper than a recursion goes and a path may be long."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DEPTH = 1500


def nest(folder: Path) -> None:
    """Folders in each other, with a file at the end; the whole path is too long for the kernel."""
    folder.mkdir(parents=True)
    at = os.open(folder, os.O_RDONLY)
    for _ in range(DEPTH):
        os.mkdir("a", dir_fd=at)
        inner = os.open("a", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(os.open("x", os.O_WRONLY | os.O_CREAT, dir_fd=at))
    os.close(at)


def remove(folder: Path) -> None:
    """Delete a folder; Python's own way goes into itself as deep as the folders are."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
