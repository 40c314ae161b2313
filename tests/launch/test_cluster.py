"""The templates for SLURM and Kubernetes run a right command on every machine."""

import getpass
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from dovetail.cli.main import app
from dovetail.config.recipes import FOLDER
from dovetail.errors import RunInterrupted

SLURM = FOLDER / "cluster" / "slurm.sbatch"
KUBERNETES = FOLDER / "cluster" / "kubernetes.yaml"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Stand-ins: `dovetail` prints its arguments, `srun` runs a command once a machine, one after another."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "dovetail": 'printf "%s\\n" "$@" --end',
        "scontrol": '[ "$*" = "show hostnames worker-[3,5]" ] && printf "worker-3\\nworker-5\\n"',
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def commands(programs: Path, arguments: list[str], **environment: str) -> list[Mapping[str, Any]]:
    """What the real command line makes of each command that was run."""
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        arguments, env={"PATH": path, **environment}, capture_output=True, text=True, check=True, timeout=30
    )
    runs = [text.strip("\n").split("\n") for text in done.stdout.split("--end\n")[:-1]]
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    assert {run[0] for run in runs} == {"train"}
    return [train.make_context("train", run[1:]).params for run in runs]


def test_slurm_runs_one_launcher_a_machine(programs: Path) -> None:
    environment = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "worker-[3,5]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    given = ["opt-13b", "sft.epochs=2", "--output-dir", "/shared/my run"]
    runs = commands(programs, ["bash", str(SLURM), *given], **environment)
    assert [run["node_rank"] for run in runs] == [0, 1]
    for run in runs:
        assert (run["recipe"], run["overrides"]) == ("opt-13b", ["sft.epochs=2"])
        assert run["output_dir"] == "/shared/my run"
        assert (run["num_nodes"], run["num_gpus"]) == (2, 8)
        assert (run["master_addr"], run["master_port"]) == ("worker-3", 24711)
        assert run["rdzv_id"] == "slurm-4711"


def test_kubernetes_runs_one_launcher_a_pod(programs: Path) -> None:
    service, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    runs = [
        commands(programs, [*container["command"], *container["args"]], JOB_COMPLETION_INDEX=index)[0]
        for index in ("0", "1")
    ]
    assert [run["node_rank"] for run in runs] == [0, 1]
    name_of_pod_0 = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    for run in runs:
        assert run["num_nodes"] == job["spec"]["completions"] == job["spec"]["parallelism"]
        assert run["num_gpus"] == container["resources"]["limits"]["nvidia.com/gpu"]
        assert run["master_addr"] == name_of_pod_0
        assert run["master_port"] == service["spec"]["ports"][0]["port"]
        assert run["master_port"] == container["ports"][0]["containerPort"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None"


def test_kubernetes_mounts_what_it_names() -> None:
    _, job = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert {rule["action"]: rule["onExitCodes"]["values"] for rule in rules} == {
        "FailJob": [1, 2],
        "Ignore": [RunInterrupted.exit_code, 128 + signal.SIGTERM],
    }
    assert pod["restartPolicy"] == "Never"  # the failure policy needs it


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Path]:
    """A SLURM controller of our own over eight machines that exist on paper; its configuration file."""
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": "localhost",
        "SlurmctldPort": "29817",
        "SlurmUser": getpass.getuser(),
        "AuthType": "auth/none",
        "CredType": "cred/none",
        "StateSaveLocation": tmp_path,
        "SlurmdSpoolDir": tmp_path,
        "SlurmctldPidFile": tmp_path / "slurmctld.pid",
        "ProctrackType": "proctrack/linuxproc",
        "SelectType": "select/cons_tres",
        "GresTypes": "gpu",
        # Machines that would be started on demand: they count as there without a daemon on them.
        "ResumeProgram": "/bin/true",
        "SuspendProgram": "/bin/true",
        "SuspendTime": "600",
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines.append("NodeName=worker-[0-7] NodeAddr=localhost CPUs=8 RealMemory=100000 Gres=gpu:8 State=CLOUD")
    lines.append("PartitionName=main Nodes=ALL Default=YES State=UP")
    file = tmp_path / "slurm.conf"
    file.write_text("\n".join(lines) + "\n")
    (tmp_path / "gres.conf").write_text("NodeName=worker-[0-7] Name=gpu Count=8\n")
    server = subprocess.Popen(
        ["/usr/sbin/slurmctld", "-D", "-c", "-f", str(file)],
        env={**os.environ, "SLURM_CONF": str(file)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield file
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


@pytest.mark.system
@pytest.mark.skipif(not shutil.which("sbatch"), reason="needs sbatch and slurmctld: Debian's slurm-wlm")
def test_slurm_would_accept_the_job(controller: Path) -> None:
    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sbatch", "--test-only", *options, str(SLURM), "opt-13b"],
            env={**os.environ, "SLURM_CONF": str(controller)},
            capture_output=True,
            text=True,
            check=False,
        )

    end = time.monotonic() + 30
    while "to start at" not in (done := submit()).stderr and time.monotonic() < end:
        time.sleep(0.5)  # until the controller listens
    assert done.returncode == 0, done.stderr
    assert "worker-[0-1]" in done.stderr
    assert submit("--nodes", "9").returncode != 0  # more than there are: it does look


@pytest.mark.system
@pytest.mark.skipif(
    not importlib.util.find_spec("kubernetes_validate"), reason="needs pip install kubernetes-validate"
)
@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
def test_kubernetes_would_accept_the_manifest(version: str) -> None:
    validate = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version]
    subprocess.run([*validate, str(KUBERNETES)], check=True, capture_output=True)
