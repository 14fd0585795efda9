"""A Ray cluster on this machine for one job: nobody else can speak to it.

A Ray cluster runs whatever its clients send. So every port of this one listens on the loopback interface alone, and every
request carries a token that is made for the job and dies with it. The token is a file that only this user can read, in no
command line and no log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray._raylet
from ray._private import ray_constants

from teachercache.errors import RecipeError
from teachercache.files import SOURCES
from teachercache.precompute.engine.termination import kept_handler, watched

FIRST_WITH_TOKENS = "2.52"
NODE_ENDED = (
    "the job stopped: the Ray node that it had started was killed, for want of memory or by somebody; finished units are kept: "
    "run the same command again to go on"
)
# Printed by Ray's core, once it is told to print nothing but what is fatal.
LEVEL_NOTICE = b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"


@contextlib.contextmanager
def local_cluster(*, cpus: int, gpus: int | None = None) -> Iterator[None]:
    """A connection to a new local cluster, which ends with it. `gpus` are by default those that Ray finds.

    Raises `RecipeError` for a Ray that knows no tokens, `JobFailed` where it dies meanwhile.
    """
    with tempfile.TemporaryDirectory(prefix="teachercache-ray-") as folder, _own_token(Path(folder)):
        try:
            with _on_loopback(), _without_notice(), kept_handler():
                _start(cpus, gpus)
            with watched(_is_alive, said=NODE_ENDED):
                yield
        finally:
            ray.shutdown()


def _start(cpus: int, gpus: int | None) -> None:
    source_root = str(SOURCES)
    python_path = os.pathsep.join(filter(None, [source_root, os.environ.get("PYTHONPATH")]))
    # Ray Data makes Ray's core report a restart caveat as an error at every start; real failures reach us as exceptions.
    with _environment({"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}):
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": python_path}},
        )


def _is_alive() -> bool:
    node: Any = ray._private.worker._global_node
    return not any(kind in _NEEDED for kind, _ in node.dead_processes())


_NEEDED = (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER)


@contextlib.contextmanager
def _own_token(folder: Path) -> Iterator[None]:
    """Authentication by a token of this job, for what this process starts and asks; as it was before, afterwards."""
    path = folder / "token"
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    try:
        with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "RAY_AUTH_TOKEN": None}):
            _read_authentication_again()
            yield
    finally:
        _read_authentication_again()


def _read_authentication_again() -> None:
    """Ray's core reads mode and token once a process, and several jobs may run in one. The mode first: threads that are still
    at work must not look for a token that is gone."""
    raylet: Any = ray._raylet
    if not hasattr(raylet, "AuthenticationTokenLoader"):
        raise RecipeError(
            f"Ray {ray.__version__} knows no authentication, so anyone could send it work; "
            f'install a newer one: pip install "ray[data]>={FIRST_WITH_TOKENS}"'
        )
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """While Ray starts, this node's address is 127.0.0.1, and servers of such a node listen there alone.

    It is how Ray starts on Windows and macOS. Its parameter `_node_ip_address` replaces a loopback address by the machine's
    own (Ray 2.52 to 2.60).
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables that processes started meanwhile have; None for one that they have not."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def _without_notice() -> Iterator[None]:
    """Pass on what is printed to file descriptor 2 meanwhile, but for the core's notice of its own log level."""
    stderr = os.dup(2)
    reads, writes = os.pipe()
    os.dup2(writes, 2)
    os.close(writes)
    passing_on = threading.Thread(target=_pass_on, args=(reads, stderr), daemon=True)
    passing_on.start()
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        passing_on.join(timeout=1)  # goes on only while a process that Ray started holds the other end


def _pass_on(reads: int, stderr: int) -> None:
    with open(reads, "rb") as lines, open(stderr, "wb", buffering=0) as out:
        for line in lines:
            if LEVEL_NOTICE not in line:
                out.write(line)
