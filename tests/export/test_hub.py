"""Runs as repositories of the Hugging Face hub, against a stand-in of it on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import megdet
from megdet.errors import InputError
from megdet.export import hub
from megdet.inference.predict import detect_image
from megdet.inference.trained import load_detector
from megdet.recipe import Recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint, update_state
from megdet.run_folder.folder import RunFolder
from small_runs import CLASS_NAMES, CPU, save_run, small_recipe, write_small_sets


def commit_of(files: dict[str, bytes]) -> str:
    """Other files are another commit."""
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


class StandIn(BaseHTTPRequestHandler):
    """The few answers of the hub that publishing and fetching need; all files go with the commit."""

    repositories: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def reply(self, content: Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, {})
            self.reply({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(sent)["files"]
            self.reply(
                {"files": [{"path": own["path"], "uploadMode": "regular", "shouldIgnore": False} for own in files]}
            )
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = commit_of(self.repositories[name])
            self.reply({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{commit}", "commitOid": commit})
        else:
            self.reply({"error": f"no {path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            content = self.repositories.get(name, {}).get(rest.split("/", 1)[1])
            if content is None:
                code = "EntryNotFound" if name in self.repositories else "RepoNotFound"
                self.reply({"error": "not found"}, 404, X_Error_Code=code)
            else:
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.reply(content, ETag=etag, X_Repo_Commit=commit_of(self.repositories[name]), Accept_Ranges="bytes")
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").split("/revision/")[0]
            own = self.repositories.get(name, {})
            files = [{"rfilename": file} for file in own]
            self.reply({"id": name, "modelId": name, "sha": commit_of(own), "siblings": files, "tags": []})
        else:
            self.reply({"error": f"no {path}"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    """What the hub has, by name; it is asked at an address of this machine."""
    from huggingface_hub import constants

    handler = type("Own", (StandIn,), {"repositories": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler.repositories
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small_recipe(write_small_sets(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("averages", [False, True])
def test_a_published_run_comes_back_with_the_detections_of_the_first(repositories, recipe, tmp_path, averages):
    folder, _ = save_run(tmp_path / "run", recipe, averages=averages)
    address = hub.push(folder, "me/shapes", is_private=True)
    assert address.endswith("/me/shapes")
    assert set(repositories["me/shapes"]) == {"model.safetensors", "config.json", "README.md"}
    pulled = RunFolder(tmp_path / "pulled")
    config = hub.pull("me/shapes", pulled)
    assert (config.class_names, config.category_ids, config.step) == (CLASS_NAMES, (10, 20, 30), 7)
    assert pulled.recipe.read_text() == folder.recipe.read_text()
    ours, theirs = (load_detector(own, CPU) for own in (folder, pulled))
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(tensor, theirs.model.state_dict()[name])
    image = sorted(Path(recipe.data.val_images).iterdir())[0]
    assert detect_image(ours, image).to_coco() == detect_image(theirs, image).to_coco()
    card = repositories["me/shapes"]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: megdet\npipeline_tag: object-detection\n")
    assert "bolt, nut, gear" in card


def published(repositories: dict[str, dict[str, bytes]], recipe: Recipe, folder: Path) -> dict[str, bytes]:
    hub.push(save_run(folder, recipe)[0], "me/shapes")
    return repositories["me/shapes"]


def changed(files: dict[str, bytes], **values: Any) -> None:
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **values}).encode()


def test_what_is_not_what_was_published_is_refused_and_nothing_is_written(repositories, recipe, tmp_path):
    files = published(repositories, recipe, tmp_path / "run")
    sound, pulled = dict(files), RunFolder(tmp_path / "pulled")

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match):
            hub.pull("me/shapes", pulled)
        assert not pulled.path.exists()
        files.clear()
        files.update(sound)

    files["model.safetensors"] = sound["model.safetensors"][:-1] + b"\x01"
    refused("model.safetensors is not what was published, its SHA-256 differs")
    changed(files, library_name="transformers")
    refused("its config.json is of transformers, not of megdet")
    changed(files, class_names=["bolt", "nut"], category_ids=[10, 20])
    refused("weights of another architecture")
    changed(files, step=-1)
    refused(r"step")
    changed(files, category_ids=[10, 20])
    refused("3 class names and 2 category ids")
    changed(files, recipe={**json.loads(files["config.json"])["recipe"], "batch_sise": 3})
    refused("unknown key 'batch_sise'")
    files["config.json"] = b"[]"
    refused("config.json")
    del files["model.safetensors"]
    refused("me/shapes: the hub refuses or does not answer")


def test_a_repository_that_is_not_there_a_bad_name_and_a_folder_with_a_run_are_refused(repositories, recipe, tmp_path):
    folder, _ = save_run(tmp_path / "run", recipe)
    with pytest.raises(InputError, match="me/nothing: the hub refuses or does not answer"):
        hub.pull("me/nothing", RunFolder(tmp_path / "pulled"))
    with pytest.raises(InputError, match="a/b/c: the hub refuses"):
        hub.pull("a/b/c", RunFolder(tmp_path / "pulled"))
    with pytest.raises(InputError, match="holds a run already; choose another"):
        hub.pull("me/shapes", folder)
    with pytest.raises(InputError, match="not a run folder"):
        hub.push(RunFolder(tmp_path / "empty"), "me/shapes")
    assert repositories == {}


def test_names_of_classes_are_text_in_the_card(recipe):
    names = ("<b>|`x`\n# y", "[a_b](c) *d*")
    config = hub.HubConfig(recipe={}, class_names=names, category_ids=(1, 2), step=1, sha256="0")
    card = hub.hub_card("me/my-shapes", config, recipe)
    assert r"- classes (2): \<b\>\|\`x\` \# y, \[a\_b\]\(c\) \*d\*" in card
    assert "megdet hub pull me/my-shapes --run" in card  # in a block of commands nothing is marked


def test_a_detector_is_loaded_by_its_name_on_the_hub_and_anew_when_that_has_changed(
    repositories, recipe, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    published(repositories, recipe, tmp_path / "run")
    image = sorted(Path(recipe.data.val_images).iterdir())[0]
    first = megdet.load("hf://me/shapes", device="cpu")(image)
    assert first.to_coco() == megdet.load(tmp_path / "run", device="cpu")(image).to_coco()
    hub.push(save_run(tmp_path / "other", recipe, seed=1)[0], "me/shapes")
    other = megdet.load("hf://me/shapes", device="cpu")(image)
    assert other.to_coco() == megdet.load(tmp_path / "other", device="cpu")(image).to_coco() != first.to_coco()
    assert len(list((tmp_path / "user/megdet/hub").iterdir())) == 2


def test_a_pull_that_failed_while_it_wrote_can_be_repeated(repositories, recipe, tmp_path, monkeypatch):
    hub.push(save_run(tmp_path / "run", recipe)[0], "me/bolts")
    out = RunFolder(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_checkpoint", no_space)
        with pytest.raises(InputError, match="no space"):
            hub.pull("me/bolts", out)
    hub.pull("me/bolts", out)
    assert load_detector(out, CPU).step == 7


def no_space(*_: Any, **__: Any) -> None:
    raise InputError("no space")


def test_processes_that_load_a_name_at_the_same_time_have_all_its_copy(repositories, recipe, tmp_path, monkeypatch):
    hub.push(save_run(tmp_path / "run", recipe)[0], "me/bolts")
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    together, save = threading.Barrier(3), hub.save_checkpoint

    def save_together(*arguments: Any, **options: Any) -> Path:
        together.wait(60)
        return save(*arguments, **options)

    monkeypatch.setattr(hub, "save_checkpoint", save_together)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(hub.cached_run, ["me/bolts"] * 3))
    assert len({folder.path for folder in found}) == 1
    assert load_detector(found[0], CPU).step == 7
    assert list((tmp_path / "cache" / "hub").iterdir()) == [found[0].path]


def test_a_copy_that_lacks_a_file_is_made_anew(repositories, recipe, tmp_path, monkeypatch):
    hub.push(save_run(tmp_path / "run", recipe)[0], "me/bolts")
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    first = hub.cached_run("me/bolts")
    first.recipe.unlink()
    assert hub.cached_run("me/bolts").path == first.path
    assert load_detector(first, CPU).step == 7
    assert list((tmp_path / "cache" / "hub").iterdir()) == [first.path]


def test_a_copy_that_another_process_finished_first_is_not_replaced(repositories, recipe, tmp_path, monkeypatch):
    hub.push(save_run(tmp_path / "run", recipe)[0], "me/bolts")
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    first = hub.cached_run("me/bolts")
    made = first.path.stat().st_ino
    with monkeypatch.context() as patch:
        answers = iter([False, True, True])  # it became whole while this process pulled
        patch.setattr(hub, "_is_whole", lambda _: next(answers))
        assert hub.cached_run("me/bolts").path == first.path
    assert first.path.stat().st_ino == made
    assert list((tmp_path / "cache" / "hub").iterdir()) == [first.path]


def test_a_copy_has_the_permissions_of_any_folder(repositories, recipe, tmp_path, monkeypatch):
    hub.push(save_run(tmp_path / "run", recipe)[0], "me/bolts")
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "plain").mkdir()
    assert hub.cached_run("me/bolts").path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_weights_of_a_step_are_published_with_its_own_numbers_only(repositories, recipe, tmp_path):
    folder, _ = save_run(tmp_path / "run", recipe)
    path = latest_checkpoint(folder)
    assert path is not None
    known = msgspec.structs.replace(open_checkpoint(path).state, evaluation={"bbox": {"AP": 0.5}}, evaluated_step=6)
    update_state(path, known)
    hub.push(folder, "me/bolts", step=7)
    config = json.loads(repositories["me/bolts"]["config.json"])
    assert (config["step"], config["evaluation"]) == (7, None)
    update_state(path, msgspec.structs.replace(known, evaluated_step=7))
    hub.push(folder, "me/bolts")
    assert json.loads(repositories["me/bolts"]["config.json"])["evaluation"] == {"bbox": {"AP": 0.5}}
    with pytest.raises(InputError, match="step_00000003"):
        hub.push(folder, "me/bolts", step=3)
