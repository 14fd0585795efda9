"""A local cluster of our own: nobody else can speak to it. And what a command leaves on a stderr that is a file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from rich.console import Console

from teachercache.config import PrecomputeConfig
from teachercache.errors import ModelError, RecipeError
from teachercache.precompute.capture.stages import KEEP_FREED_MEMORY, resources_of
from teachercache.precompute.engine.cluster import cluster_nodes, connected
from teachercache.precompute.engine.local_ray import local_cluster
from teachercache.precompute.engine.placement import placed

from builders import sentences, tiny_recipe, tiny_teacher

ROOT = Path(__file__).parents[3]
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def listeners() -> dict[tuple[int, int], str]:
    """Addresses by process and port: of this process, and of all that it started."""
    me = psutil.Process()
    found = {}
    for process in (me, *me.children(recursive=True)):
        for socket in process.net_connections(kind="inet"):
            if socket.status == psutil.CONN_LISTEN or (socket.type == 2 and not socket.raddr):
                found[process.pid, socket.laddr.port] = socket.laddr.ip
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[tuple[int, int], str]]:
    """Two CPUs more than a laptop's and two GPUs that nobody has; yields what listened before."""
    before = listeners()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MODE, "disabled")  # a user's own settings are for clusters of the user's
        patch.setenv(TOKEN, "of-another-cluster")
        with local_cluster(cpus=4, gpus=2):
            yield before
        assert (os.environ[MODE], os.environ[TOKEN]) == ("disabled", "of-another-cluster")
        assert TOKEN_PATH not in os.environ


def test_every_port_of_the_job_is_on_the_loopback_interface(cluster: dict[tuple[int, int], str]) -> None:
    @ray.remote
    class Worker:
        def pid(self) -> int:
            return os.getpid()

    worker = Worker.remote()
    pid = ray.get(worker.pid.remote())
    ray.data.from_items([1]).map(lambda row: row).take_all()  # with the actors that Ray Data starts for itself
    found = {key: address for key, address in listeners().items() if key not in cluster}
    names = {psutil.Process(process).name() for process, _ in found}
    assert {"gcs_server", "raylet"} <= names and pid in {process for process, _ in found} and len(found) >= 8
    addresses = {ip_address(address.removeprefix("::ffff:")) for address in found.values()}
    assert all(address.is_loopback for address in addresses), addresses


PROBE = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None)
"""


def ask(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if name not in (MODE, TOKEN, TOKEN_PATH)}
    return subprocess.run(
        [sys.executable, "-c", PROBE, address], env={**others, **environment}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def test_a_client_without_the_token_is_refused(cluster: object) -> None:
    address = ray.get_runtime_context().gcs_address
    token = Path(os.environ[TOKEN_PATH])
    assert ask(address, **{MODE: "token", TOKEN_PATH: str(token)}).returncode == 0
    for other in ({MODE: "disabled"}, {MODE: "token", TOKEN: "0" * 64}):
        refused = ask(address, **other)
        assert refused.returncode != 0 and "nauthenticated" in refused.stderr
    agent = next(
        address.port
        for process in psutil.Process().children(recursive=True)
        if "RuntimeEnvAgent" in " ".join(process.cmdline())
        for address in [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{agent}/get_or_create_runtime_env", data=b"", timeout=30)
    assert error.value.code == 401


def test_the_token_is_in_a_file_of_this_user_and_nowhere_else(cluster: object) -> None:
    path = Path(os.environ[TOKEN_PATH])
    token = path.read_text()
    assert len(token) == 64 and path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for process in psutil.Process().children(recursive=True):
        assert token not in " ".join(process.cmdline()) and token not in process.environ().values()
    logs = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [file for file in logs.rglob("*") if file.is_file()]
    assert len(files) > 5 and not [file for file in files if token.encode() in file.read_bytes()]


def test_one_teacher_a_gpu(cluster: object, tmp_path: Path) -> None:
    """Ray's own word for it: two actors at a time, each with a GPU of its own."""
    with connected(PrecomputeConfig()):  # the one that is there
        placement = placed(PrecomputeConfig(), cluster_nodes(), units=9)
    assert placement.describe() == "teacher: 2 actors with a GPU each"
    gpus = ray.remote(**resources_of(placement))(lambda: ray.get_gpu_ids())
    assert sorted(ray.get([gpus.remote(), gpus.remote()]))[0] in ([0], [1], ["0"], ["1"])
    with pytest.raises(RecipeError, match="room for an actor with 9 CPUs and a GPU"):
        placed(PrecomputeConfig(threads_per_actor=9), cluster_nodes(), units=9)


def test_an_actor_with_every_cpu_leaves_enough_to_tokenise(cluster: object, tmp_path: Path) -> None:
    from teachercache.precompute.capture.job import run_precompute

    precompute = {"gpus_per_actor": 0, "threads_per_actor": 4}
    recipe = tiny_recipe(tmp_path, teacher=tiny_teacher(tmp_path / "teacher"), precompute=precompute)
    assert run_precompute(recipe, console=Console(quiet=True))["positions"] > 0


def test_a_gpu_that_torch_cannot_use_is_said_in_a_line(cluster: object, tmp_path: Path) -> None:
    from teachercache.precompute.capture.job import run_precompute

    teacher = tiny_teacher(tmp_path / "teacher")
    recipe = tiny_recipe(tmp_path, teacher=teacher, precompute={"gpus_per_actor": "auto"})
    with pytest.raises(
        ModelError, match=r"has a GPU, which its torch .* cannot use; .*set precompute.gpus_per_actor: 0"
    ):
        run_precompute(recipe, console=Console(quiet=True))


def test_processes_with_a_teacher_keep_freed_memory(cluster: object) -> None:
    """In the environment before they start: glibc reads it once."""
    placement = placed(PrecomputeConfig(gpus_per_actor=0), cluster_nodes(), units=1)
    task = ray.remote(**resources_of(placement))(lambda: dict(os.environ))
    assert ray.get(task.remote()).items() >= KEEP_FREED_MEMORY.items()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    python_path = os.pathsep.join([str(ROOT / "pipeline"), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name not in (MODE, TOKEN, TOKEN_PATH)}
    environment |= {"PYTHONPATH": python_path, "COLUMNS": "400"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


OURS = (
    r"planning: reading .*",
    r"starting Ray and loading the teacher …",
    r"teacher: 1 actor on the CPU, 1 thread \(no GPU in the cluster\)",
    r"cached \d+ rows to train on and \d+ held-out ones, .*",
    r"of the teacher's time: .*",
)


def test_a_redirected_stderr_holds_our_lines_alone(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=tiny_teacher(tmp_path / "teacher"), texts=sentences(40, seed=3))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    done = run("-m", "teachercache", "precompute", str(path), "--json")
    assert done.returncode == 0, done.stderr
    # On a slow day the job says meanwhile how far it is.
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d+ of \d+ units: ", line)]
    assert len(lines) == len(OURS), done.stderr
    for line, pattern in zip(lines, OURS, strict=True):
        assert re.fullmatch(pattern, line.rstrip()), done.stderr
    assert "logging.cc" not in done.stderr and "\r" not in done.stderr


BARS = """
import sys
from teachercache.console import run_command

def work(console):
    from datasets.utils import tqdm as of_datasets
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM
    list(tqdm(range(3))), list(of_datasets(range(3)))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model.save_pretrained(sys.argv[2])
    console.print("ours")
    return {}

run_command(work, as_json=True, show=str)
"""


def test_libraries_draw_no_bars_into_a_file(tmp_path: Path) -> None:
    """Those of Ray's, transformers' and datasets' are all tqdm's."""
    done = run("-c", BARS, str(tiny_teacher(tmp_path / "teacher")), str(tmp_path / "copy"))
    assert (done.stdout, done.stderr) == ("{}\n", "ours\n")


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_refused_before_anything_waits(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, teacher=tiny_teacher(tmp_path / "teacher"), precompute={"gpus_per_actor": 1})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    done = run("-m", "teachercache", "precompute", str(path), "--json")
    assert done.returncode == 2 and "the cluster has no GPU" in json.loads(done.stdout)["error"]
