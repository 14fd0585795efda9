"""Disks after a power cut: file operations of a command are recorded with strace, and for each moment the worst is made of
them that a file system may do.

What was not synced may be lost: bytes of a file whose `fsync` did not return, names that were added to, or removed from, a
folder that was not synced since. It need not be lost, either: names may be there whose bytes are not.
"""

from __future__ import annotations

import codecs
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

HAS_STRACE = shutil.which("strace") is not None
CALLS = (
    "openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,sync_file_range,mmap,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,symlink,symlinkat"
)
UNDERSTOOD = {
    "open", "write", "fsync", "rename", "link", "unlink", "rmdir", "mkdir", "ftruncate",
}  # fmt: skip
FOLDER = -1  # in place of an inode's number
# What becomes of names that were not synced: forgotten, kept (with half of the bytes that were not synced), or only removals.
WORST = ("undone", "kept", "removed")


@dataclass(frozen=True)
class Operation:
    """One call that succeeded: its name, the paths that it is about, and the bytes that it wrote."""

    call: str
    paths: tuple[str, ...]
    data: bytes = b""
    truncates: bool = False


def recorded(command: Sequence[str], *, below: Path, environment: dict[str, str], log: Path) -> list[Operation]:
    """Operations of a command on files below a folder, in order. Raises `ValueError` for a call that is not understood."""
    tracing = ["strace", "-f", "-y", "-xx", "-s", str(2**24), "--seccomp-bpf", "-e", f"trace={CALLS}", "-o", str(log)]
    subprocess.run([*tracing, *command], env=environment, check=True, capture_output=True, timeout=600)
    return [operation for line in _whole_lines(log) for operation in _parsed(line, f"{below}/")]


def _whole_lines(log: Path) -> Iterator[str]:
    """Lines of a log, each with the end that comes later where another thread was faster."""
    begun: dict[str, str] = {}
    with log.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            thread, _, rest = line.rstrip("\n").partition(" ")
            rest = rest.lstrip()
            if rest.endswith("<unfinished ...>"):
                begun[thread] = rest.removesuffix("<unfinished ...>")
            elif match := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
                yield begun.pop(thread) + match[1]
            else:
                yield rest


_CALL = re.compile(r"(\w+)\((.*)\)\s+= (\d+)(<.*>)?$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_OPENED = re.compile(r"\d+<((?:\\x[0-9a-f]{2}|[^>\\])*)>")


def _parsed(line: str, below: str) -> Iterator[Operation]:
    match = _CALL.match(line)
    if match is None:
        return  # a signal, or a call that failed
    call, arguments, _, opened = match.groups()
    if call == "mmap":
        if "PROT_WRITE" in arguments and "MAP_SHARED" in arguments and below in _unescaped(arguments):
            raise ValueError(f"a file is written to through memory: {line[:200]}")
        return
    descriptors = [_unescaped(text) for text in _OPENED.findall(arguments)]
    if call in ("openat", "creat"):
        path = _unescaped((opened or "").strip("<>"))
        if path.startswith(below) and ("O_CREAT" in arguments or "O_TRUNC" in arguments or call == "creat"):
            yield Operation("open", (path,), truncates="O_TRUNC" in arguments or call == "creat")
        return
    if call in ("write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "sync_file_range"):
        if descriptors[0].startswith(below):
            yield _of_open_file(call, descriptors[0], match[2], line)
        return
    strings = [_unescaped(text) for text in _STRING.findall(arguments)]
    paths = tuple(text if text.startswith("/") else f"{descriptors[0]}/{text}" for text in strings)
    if any(path.startswith(below) for path in paths):
        name = re.sub(r"at2?$", "", call)
        name = "rmdir" if "AT_REMOVEDIR" in arguments else name
        if name not in UNDERSTOOD:
            raise ValueError(f"a call that nobody understands here: {line[:200]}")
        yield Operation(name, paths)


def _of_open_file(call: str, path: str, arguments: str, line: str) -> Operation:
    if call in ("fsync", "fdatasync"):
        return Operation("fsync", (path,))
    if call == "write":
        return Operation("write", (path,), codecs.escape_decode(_STRING.search(arguments)[1])[0])  # type: ignore[index]
    raise ValueError(f"a call that nobody understands here: {line[:200]}")


def _unescaped(text: str) -> str:
    return codecs.escape_decode(text)[0].decode()


@dataclass
class _File:
    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""


class Disk:
    """A disk, as the operations so far have left it, and as it may be found after a power cut."""

    def __init__(self, root: Path, before: Mapping[str, bytes | None]) -> None:
        self._root = str(root)
        self._files: list[_File] = []
        self._names: dict[str, int] = {}
        for name, data in before.items():
            self._names[f"{root}/{name}"] = FOLDER if data is None else len(self._files)
            self._files += [] if data is None else [_File(bytearray(data), data)]
        self._synced = dict(self._names)
        self._since: list[tuple[str, int | None]] = []  # names that were added, None: removed, and not synced yet

    def apply(self, operation: Operation) -> None:
        """Do what the operation did."""
        path = operation.paths[0]
        match operation.call:
            case "open":
                if path not in self._names:
                    self._files.append(_File())
                    self._set(path, len(self._files) - 1)
                elif operation.truncates:
                    self._file(path).data.clear()
            case "write":
                self._file(path).data.extend(operation.data)
            case "fsync":
                self._sync(path)
            case "mkdir":
                self._set(path, FOLDER)
            case "unlink" | "rmdir":
                self._set(path, None)
            case "link":
                self._set(operation.paths[1], self._names[path])
            case "rename":
                self._set(operation.paths[1], self._names[path])
                self._set(path, None)
            case other:
                raise ValueError(other)

    def after_a_cut(self, worst: str) -> dict[str, bytes | None]:
        """Files by path, None for a folder, as one of `WORST` leaves them."""
        names = dict(self._synced)
        for path, number in self._since:
            if number is None and worst != "undone":
                names.pop(path, None)
            elif number is not None and worst == "kept":
                names[path] = number
        return {
            path: None if number == FOLDER else self._bytes(number, half=worst == "kept")
            for path, number in names.items()
            if all(str(parent) in names for parent in Path(path).parents if str(parent).startswith(f"{self._root}/"))
        }

    def _bytes(self, number: int, *, half: bool) -> bytes:
        file = self._files[number]
        if bytes(file.data) == file.synced:
            return file.synced
        return bytes(file.data[: len(file.data) // 2]) if half else file.synced

    def _file(self, path: str) -> _File:
        return self._files[self._names[path]]

    def _set(self, path: str, number: int | None) -> None:
        if number is None:
            self._names.pop(path, None)
        else:
            self._names[path] = number
        self._since.append((path, number))

    def _sync(self, path: str) -> None:
        if self._names.get(path, FOLDER) != FOLDER:
            self._file(path).synced = bytes(self._file(path).data)
            return
        for name, number in [entry for entry in self._since if str(Path(entry[0]).parent) == path]:
            if number is None:
                self._synced.pop(name, None)
            else:
                self._synced[name] = number
        self._since = [entry for entry in self._since if str(Path(entry[0]).parent) != path]


def states(
    operations: Sequence[Operation], root: Path, *, before: Mapping[str, bytes | None] = MappingProxyType({})
) -> list[dict[str, bytes | None]]:
    """All that may be found below `root` after a power cut that follows one of the operations, each once, by relative names.
    `before` is what was there already."""
    disk, found = Disk(root, before), dict[tuple[tuple[str, bytes | None], ...], None]()
    for operation in operations:
        disk.apply(operation)
        for worst in WORST:
            left = {str(Path(path).relative_to(root)): data for path, data in disk.after_a_cut(worst).items()}
            found.setdefault(tuple(sorted(left.items())))
    return [dict(state) for state in found]


def laid_out(state: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder of what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in sorted(state.items()):
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(data)
