"""The precompute job on real Ray, as users run it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from teachercache.cache import Cache, verify

from builders import build_cache, sentences, tiny_recipe, tiny_teacher

ROOT = Path(__file__).parents[3]
SKETCH = {"logits": {"kind": "head+sketch", "k": 6, "rank": 16, "step": 0.1, "calibration_positions": 400}}
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny-teacher")


def recipe_file(folder: Path, **sections) -> Path:
    recipe = tiny_recipe(folder, **sections)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def command(*arguments: str, **environment: str) -> subprocess.Popen:
    python_path = os.pathsep.join([str(ROOT / "pipeline"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": python_path, **environment},
    )  # fmt: skip


def shards(cache: Path) -> dict[str, bytes]:
    files = [*(cache / "shards").iterdir(), *(cache / "teacher").glob("sketch-*")]
    return {path.name: path.read_bytes() for path in files}


def test_any_number_of_actors_gives_identical_shards(tmp_path, teacher):
    """1, 2 and 3 teacher actors with default threads, and the stages run one by one in this process: the same files,
    the calibrated basis included."""
    code = (
        "import sys, json, ray; from rich.console import Console; from teachercache.config import load_recipe;"
        "from teachercache.precompute.engine.cluster import connected;"
        "from teachercache.precompute.capture.job import run_precompute;"
        "recipes = [load_recipe(path) for path in sys.argv[1:]];\n"
        "with connected(recipes[-1].precompute):\n"
        "    print(json.dumps([run_precompute(r, console=Console(stderr=True)) for r in recipes]))"
    )
    texts = sentences(70, seed=3)
    files = [
        recipe_file(
            tmp_path / f"actors-{n}",
            teacher=teacher,
            texts=texts,
            targets=SKETCH,
            precompute={"actors": n, "threads_per_actor": None},
        )
        for n in (1, 2, 3)
    ]
    process = command("-c", code, *map(str, files))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    alone = tiny_recipe(
        tmp_path / "alone", teacher=teacher, texts=texts, targets=SKETCH, precompute={"threads_per_actor": None}
    )
    expected = shards(build_cache(alone))
    assert len(expected) == 6
    for summary in json.loads(out):
        assert shards(Path(summary["cache"])) == expected
        assert summary["positions_computed"] == summary["positions"] > 0
        assert verify(summary["cache"]) == []


def test_a_killed_job_resumes_where_it_was(tmp_path, teacher):
    """SIGKILL once a unit is done; run again: only the rest is computed, and the result is that of an undisturbed run."""
    texts = sentences(60, seed=4)
    settings = {"unit_rows": 6, "positions_per_batch": 64}
    path = recipe_file(tmp_path / "killed", teacher=teacher, texts=texts, precompute=settings)
    cache = tmp_path / "killed" / "cache"
    process = command("-m", "teachercache", "precompute", str(path), "--json")
    deadline = time.time() + 600
    while not list(cache.glob(".work/done/*.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(list(cache.glob(".work/done/*.json")))
    assert not (cache / "manifest.json").exists(), "killed too late to show anything"
    resumed = command("-m", "teachercache", "precompute", str(path), "--json")
    out, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    summary = json.loads(out)
    # Workers may finish a unit more before they notice that their driver is gone.
    told = re.search(r"resuming: (\d+) of 10 units are done", " ".join(err.split()))
    assert done > 0 and told and int(told[1]) >= done
    assert 0 < summary["positions_computed"] < summary["positions"]
    events = events_of(cache)
    assert [event["event"] for event in events].count("started") == 2 and events[-1]["event"] == "finished"
    second = max(number for number, event in enumerate(events) if event["event"] == "started")
    units = [event for event in events[second:] if event["event"] == "unit"]
    for name in ("rows", "positions", "bytes"):
        assert sum(unit[name] for unit in units) == summary[f"{name}_computed"] > 0
    assert summary["utilisation"].keys() >= {*units[0]["stage_seconds"], "forward", "encoding", "writing", "waiting"}
    assert 0 < sum(summary["utilisation"][name] for name in ("forward", "encoding", "writing", "waiting")) <= 1.01
    alone = build_cache(tiny_recipe(tmp_path / "alone", teacher=teacher, texts=texts, precompute=settings))
    assert shards(cache) == shards(alone)
    assert (cache / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()


def events_of(cache: Path) -> list[dict]:
    """Events in the log beside a cache, of all jobs that wrote to it."""
    log = cache.with_name(f"{cache.name}.precompute.log.jsonl")
    return [json.loads(line) for line in log.read_text().splitlines()]


@contextlib.contextmanager
def ray_head(environment: dict[str, str]) -> Iterator[str]:
    """A Ray cluster of one node with its job server, apart from any other Ray on this machine; yields its address."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, dashboard = probe.getsockname()[1], other.getsockname()[1]
    arguments = ["start", "--head", "--block", f"--port={port}", "--num-cpus=4", "--dashboard-host=127.0.0.1"]
    arguments += [f"--dashboard-port={dashboard}", "--include-dashboard=true", "--disable-usage-stats"]
    head = subprocess.Popen(
        [RAY, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.time() + 90
        while time.time() < deadline and head.poll() is None:
            listing = [RAY, "job", "list", "--address", address]
            if subprocess.run(listing, env=environment, capture_output=True, timeout=60, check=False).returncode == 0:
                break
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def submit(address: str, environment: dict[str, str], *script: str) -> subprocess.CompletedProcess[str]:
    """Submit a script of jobs/ and wait for its end; the node's agent, which starts jobs, comes up after the server that lists
    them."""
    line = [
        RAY,
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        str(ROOT / "jobs"),
        "--",
        sys.executable,
        *script,
    ]
    deadline = time.time() + 120
    while True:
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600, check=False)
        if "No available agent" not in done.stderr or time.time() > deadline:
            return done
        time.sleep(1)


def test_the_script_runs_under_ray_job_submit(tmp_path, teacher):
    """`ray job submit --working-dir . -- python jobs/precompute_teacher.py RECIPE`: the way to a cluster."""
    path = recipe_file(tmp_path, teacher=teacher, precompute={"actors": 2})
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT / "pipeline")}
    with ray_head(environment) as address:
        submitted = submit(address, environment, "precompute_teacher.py", str(path), "--json")
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert '"positions_per_second"' in submitted.stdout
    assert verify(tmp_path / "cache") == []
    assert Cache.open(tmp_path / "cache").manifest.audit.stored == 40


def test_an_error_inside_an_actor_is_one_line(tmp_path, teacher):
    """The weights are found unreadable only where they are loaded: in the actor."""
    broken = tiny_teacher(tmp_path / "broken")
    path = recipe_file(tmp_path, teacher=broken)
    (broken / "model.safetensors").write_bytes(b"these are no weights")
    process = command("-m", "teachercache", "precompute", str(path), "--json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2, err
    assert json.loads(out)["error"].startswith(f"model of {broken} cannot be loaded")
    assert "Traceback" not in err
    assert [event["event"] for event in events_of(tmp_path / "cache")] == ["started", "planned", "placed", "failed"]
