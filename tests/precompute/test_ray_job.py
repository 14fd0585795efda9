"""The precompute job on real Ray, as users run it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from teachercache.shards import Cache, verify

from builders import build_cache, sentences, tiny_recipe, tiny_teacher

ROOT = Path(__file__).parents[2]


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
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


def test_any_number_of_actors_gives_the_shards_of_none(tmp_path, teacher):
    """1, 2 and 3 teacher actors, and the stages run one by one in this process: identical files."""
    code = (
        "import sys, json, ray; from rich.console import Console; from teachercache.config import load_recipe;"
        "from teachercache.precompute.cluster import connected; from teachercache.precompute.job import run_precompute;"
        "recipes = [load_recipe(path) for path in sys.argv[1:]];\n"
        "with connected(recipes[-1].precompute):\n"
        "    print(json.dumps([run_precompute(r, console=Console(stderr=True)) for r in recipes]))"
    )
    texts = sentences(70, seed=3)
    files = [
        recipe_file(tmp_path / f"actors-{n}", teacher=teacher, texts=texts, precompute={"actors": n}) for n in (1, 2, 3)
    ]
    process = command("-c", code, *map(str, files))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    expected = shards(build_cache(tiny_recipe(tmp_path / "alone", teacher=teacher, texts=texts)))
    assert len(expected) == 5
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
    deadline = time.time() + 180
    while not list(cache.glob(".work/done/*.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = len(list(cache.glob(".work/done/*.json")))
    assert not (cache / "manifest.json").exists(), "killed too late to show anything"
    resumed = command("-m", "teachercache", "precompute", str(path), "--json")
    out, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    summary = json.loads(out)
    assert f"resuming: {done} of 10 units are done" in err or done == 0
    assert (summary["positions_computed"] < summary["positions"]) == (done > 0)
    alone = build_cache(tiny_recipe(tmp_path / "alone", teacher=teacher, texts=texts, precompute=settings))
    assert shards(cache) == shards(alone)
    assert (cache / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()


def test_the_script_runs_under_ray_job_submit(tmp_path, teacher):
    """`ray start`, then `ray job submit -- python jobs/precompute_teacher.py RECIPE`: the way to a cluster."""
    ray = Path(sys.executable).parent / "ray"
    path = recipe_file(tmp_path, teacher=teacher, precompute={"actors": 2})
    environment = {
        **os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT / "pipeline"),
        "RAY_TMPDIR": "/tmp",
    }  # fmt: skip
    started = subprocess.run(
        [ray, "start", "--head", "--port=0", "--num-cpus=4", "--dashboard-host=127.0.0.1", "--dashboard-port=8299",
         "--include-dashboard=true", "--disable-usage-stats"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        submitted = subprocess.run(
            [ray, "job", "submit", "--address", "http://127.0.0.1:8299", "--", sys.executable,
             str(ROOT / "jobs" / "precompute_teacher.py"), str(path), "--json"],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert '"positions_per_second"' in submitted.stdout
    finally:
        subprocess.run([ray, "stop", "--force"], env=environment, capture_output=True, timeout=120, check=False)
    assert verify(tmp_path / "cache") == []
    assert Cache.open(tmp_path / "cache").manifest.audit.stored == 40


def test_an_error_inside_an_actor_is_one_line(tmp_path, teacher):
    """The weights are found unreadable only where they are loaded: in the actor."""
    broken = tiny_teacher(tmp_path / "broken")
    path = recipe_file(tmp_path, teacher=broken)
    (broken / "model.safetensors").write_bytes(b"these are no weights")
    process = command("-m", "teachercache", "precompute", str(path), "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert json.loads(out)["error"].startswith(f"model of {broken} cannot be loaded")
    assert "Traceback" not in err
