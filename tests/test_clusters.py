"""The files of examples/clusters: validators take them, and scripts do what they say with stand-ins for a cluster."""

import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from megdet.cli.main import make_parser
from megdet.recipe_file import packaged_recipes

FOLDER = Path(__file__).parents[1] / "examples/clusters"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
DOCUMENTS = [own for file in sorted(FOLDER.glob("*.yaml")) for own in yaml.safe_load_all(file.read_text())]


def stand_in(folder: Path, name: str, text: str) -> None:
    """A program of this name, first on the path of a script that is tried."""
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)


def run_script(name: str, *words: str, programs: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{programs}:/usr/bin:/bin", **variables}
    command = ["bash", str(FOLDER / name), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def parsed(words: list[str]) -> Any:
    return make_parser(words[0]).parse_known_args(words)[0]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda own: own.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda own: own["kind"])
def test_every_field_of_a_document_is_known_to_kubernetes_and_kubeflow(document: dict[str, Any]) -> None:
    from kubeflow_trainer_api import models  # takes seconds

    if document["kind"] == "Job":
        document, model = document["spec"], models.IoK8sApiBatchV1JobSpec
    else:
        model = getattr(models, f"TrainerV1alpha1{document['kind']}")
    assert model.from_dict(document).to_dict() == document, "a field that it does not know is dropped"


def test_every_command_of_a_container_is_one_of_ours() -> None:
    commands = [re.findall(r"command: \[(.*)\]", file.read_text())[0] for file in sorted(FOLDER.glob("*.yaml"))]
    for command in commands:
        words = [word.strip('" ') for word in command.split(",")]
        options = parsed(words[words.index("megdet") + 1 :][words[0] == "torchrun" :])
        assert options.recipe in packaged_recipes()
        assert options.run.is_absolute(), "on the volume that outlives the pod"


def test_torchrun_gets_a_meeting_point_and_a_command_that_megdet_takes(tmp_path: Path) -> None:
    stand_in(tmp_path, "torchrun", 'printf "%q " "$@"')
    done = run_script(
        "torchrun.sh", "host1", "demo", "runs/a", "--precision", "bfloat16", programs=tmp_path, NNODES="3"
    )
    words = shlex.split(done.stdout)
    assert words[:2] == ["--nnodes", "3"]
    assert words[words.index("--rdzv-endpoint") + 1] == "host1:29400"
    assert parsed(words[words.index("--") + 1 :]).run == Path("runs/a")


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (0, False), (2, False), (143, False)])
def test_slurm_starts_every_rank_and_requeues_on_75_alone(tmp_path: Path, code: int, is_requeued: bool) -> None:
    stand_in(tmp_path, "scontrol", f'if [ "$1" = show ]; then echo node1; else echo "$@" >> {tmp_path}/requeued; fi')
    stand_in(tmp_path, "megdet", f'echo "$RANK of $WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*"; exit {code}')
    both = "for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2"
    stand_in(tmp_path, "srun", f'shift\n{both} "$@" || code=$?; done\nexit ${{code:-0}}')
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "42"}
    done = run_script("slurm.sh", "demo", "runs/a", "--seed", "1", programs=tmp_path, **variables)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == [
        f"{rank} of 2 at node1:20042: train demo --run runs/a --seed 1" for rank in range(2)
    ]
    assert (tmp_path / "requeued").exists() == is_requeued


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_spot_machine_that_is_taken_tells_the_training_and_ends_with_its_code(tmp_path: Path, is_taken: bool) -> None:
    class Metadata(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"token")

        def do_GET(self) -> None:
            is_running = (tmp_path / "running").exists()  # before its trap is set a signal would kill the stand-in
            known = is_taken and is_running and self.headers["X-aws-ec2-metadata-token"] == "token"
            self.send_response(200 if known and self.path.endswith("/spot/instance-action") else 404)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    stand_in(
        tmp_path,
        "megdet",
        f"trap 'exit 75' USR1\ntouch {tmp_path}/running\nfor i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done\nexit 0",
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        variables = {"METADATA": address, "SECONDS_BETWEEN": "0.2"}
        done = run_script("spot.sh", "demo", "runs/a", programs=tmp_path, **variables)
        server.shutdown()
    assert done.returncode == (75 if is_taken else 0), done.stderr
