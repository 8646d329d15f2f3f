"""`megdet serve` as a process of its own."""

import http.client
import json
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

import megdet
from app_servers import command
from megdet.cli import serving
from megdet.cli.main import main


def detect(address: str, content: bytes, query: str = "") -> dict[str, object]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.request("POST", f"/api/detect{query}", content, {"Content-Type": "image/png"})
    answer = connection.getresponse()
    assert answer.status == 200
    body = json.loads(answer.read())
    connection.close()
    return body


def test_it_finds_what_the_python_interface_finds(real_server):
    for run, query in zip(real_server.runs, ("", "?run=1"), strict=True):
        ours = megdet.load(run, device="cpu")(real_server.image)
        found = detect(real_server.address, real_server.image.read_bytes(), query)
        assert len(ours) > 5
        assert [own["label"] for own in found["objects"]] == ours.labels.tolist()
        assert [edge for own in found["objects"] for edge in own["box"]] == pytest.approx(
            ours.boxes.ravel().tolist(), abs=2e-3
        )
        assert [own["score"] for own in found["objects"]] == pytest.approx(ours.scores.tolist(), abs=2e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order_with_code_0(number, tmp_path):
    with command(tmp_path) as server:
        detect(server.address, server.image.read_bytes())
        server.process.send_signal(number)
        said, complained = server.process.communicate(timeout=120)
        assert (server.process.returncode, complained) == (0, "")
        assert said == "stopped after 1 image(s) in 1 call(s) of a detector\n"


def test_what_is_missing_is_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    assert main(["serve", str(tmp_path / "none"), "--port", "0", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"megdet: {tmp_path / 'none'}: no such run folder\n"
    monkeypatch.setattr(serving, "_PACKAGES", {"fastapi": "fastapi", "no_such_module": "no-such-package"})
    assert main(["serve", "runs/demo"]) == 2
    assert capsys.readouterr().err == "megdet: serve needs no-such-package: pip install 'megdet[serve]'\n"


def test_another_address_than_this_machines_is_warned_of_once(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none"), "--host", "0.0.0.0", "--port", "0", "--device", "cpu"]) == 2
    warning, refusal = capsys.readouterr().err.splitlines()
    assert warning.startswith("Anybody who reaches http://0.0.0.0:")
    assert refusal.endswith("no such run folder")


def test_the_help_of_serve_loads_no_server():
    code = "import sys; from megdet.cli.main import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == "set()\n"
    assert "--allow-host NAME" in done.stdout
