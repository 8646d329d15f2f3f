"""What the endpoint answers, without a network between."""

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app_servers import CLASSES, png, served, three_objects
from megdet.app.application import make_application
from megdet.app.batcher import Batcher
from megdet.app.requests import Limits

IMAGE = {"Content-Type": "image/png"}


def with_masks(images):
    return three_objects(images, with_masks=True)


def broken(images):
    raise RuntimeError("/home/me/secret is on fire")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    runs = [served(pixels=10_000), served(with_masks, "second"), served(broken, "broken")]
    with Batcher(runs) as batcher:
        app = make_application(batcher, Limits(max_bytes=20_000), ["Demo.Example"])
        yield TestClient(app, "http://localhost", raise_server_exceptions=False)


def test_a_body_and_a_file_of_a_form_get_the_same_objects(client):
    body = client.post("/api/detect", content=png(), headers=IMAGE).json()
    form = client.post("/api/detect", files={"file": ("a.png", png(), "image/png")}).json()
    assert (body["run"], body["height"], body["width"], body["images_together"]) == ("first", 30, 40, 1)
    assert body["objects"] == form["objects"]
    assert body["objects"][0] == {
        "box": [1.0, 2.0, 11.0, 12.0],
        "score": 0.9,
        "label": 0,
        "name": CLASSES[0],
        "category_id": 10,
        "mask": None,
    }
    assert [own["score"] for own in body["objects"]] == [0.9, 0.6, 0.3]


@pytest.mark.parametrize("run", ["1", "second"])
def test_a_run_is_named_by_its_index_or_name_and_masks_come_as_runs_of_pixels(client, run):
    found = client.post("/api/detect", params={"run": run}, content=png(), headers=IMAGE).json()
    assert found["run"] == "second"
    assert found["objects"][0]["mask"]["size"] == [30, 40]
    assert found["objects"] == [
        {**own, "mask": {"size": [30, 40], "counts": own["mask"]["counts"]}} for own in found["objects"]
    ]


def test_a_server_whose_detectors_have_stopped_says_so_at_once():
    with Batcher([served()]) as batcher:
        client = TestClient(make_application(batcher, Limits()), "http://localhost")
    for answer in (client.get("/api/health"), client.post("/api/detect", content=png(), headers=IMAGE)):
        assert answer.status_code == 503
        assert "start the server again" in answer.text


def test_a_number_is_an_index_also_where_a_run_is_called_so():
    """The page asks by index; a folder may be called 1."""
    with Batcher([served(name="1"), served(name="0")]) as batcher:
        client = TestClient(make_application(batcher, Limits()), "http://localhost")
        names = [
            client.post("/api/detect", params={"run": run}, content=png(), headers=IMAGE).json()["run"]
            for run in ("0", "1")
        ]
    assert names == ["1", "0"]


def test_a_score_leaves_out_what_has_less(client):
    found = client.post("/api/detect", params={"score": 0.6}, content=png(), headers=IMAGE).json()
    assert [own["score"] for own in found["objects"]] == [0.9, 0.6]


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "why"),
    [
        ("/api/detect", b"", IMAGE, 400, "the body is empty"),
        ("/api/detect", b"no image", IMAGE, 400, "cannot be read as an image"),
        ("/api/detect", png(101, 100), IMAGE, 413, "100 x 101 pixels are more than data.max_pixels 10000"),
        ("/api/detect", b"x" * 20_001, IMAGE, 413, "more than 20000 bytes"),
        ("/api/detect", png(), {"Content-Type": "text/html"}, 415, "send the image as the body"),
        ("/api/detect", png(), {}, 415, "send the image as the body"),
        ("/api/detect", b"{}", {"Content-Type": "multipart/form-data"}, 400, "the form cannot be read"),
        ("/api/detect?run=3", png(), IMAGE, 404, "no run '3'; there are 0 (first), 1 (second), 2 (broken)"),
        ("/api/detect?run=/etc/passwd", png(), IMAGE, 404, "no run '/etc/passwd'"),
        ("/api/detect?run=-1", png(), IMAGE, 404, "no run '-1'"),
        ("/api/detect?run=\u00b2", png(), IMAGE, 404, "no run"),
        ("/api/detect?score=2", png(), IMAGE, 422, "score: "),
        ("/api/detect?score=nan", png(), IMAGE, 422, "score: "),
        ("/api/detect?run=2", png(), IMAGE, 500, "a fault of the server; its terminal says more"),
        ("/nothing", b"", {}, 404, "Not Found"),
        ("/../etc/passwd", b"", {}, 404, "Not Found"),
    ],
    ids=lambda own: own if isinstance(own, str) else "",
)
def test_a_refusal_is_one_line_of_json(client, path, content, headers, status, why):
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert why in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_form_without_a_file_with_two_and_with_endless_headers_is_refused(client):
    assert "no file" in client.post("/api/detect", files={"file": (None, b"text")}).json()["error"]
    two = [("file", ("a.png", png())), ("file", ("b.png", png()))]
    assert client.post("/api/detect", files=two).status_code == 400
    form = b"--x\r\nContent-Disposition: form-data; name=" + b"y" * 15_000
    endless = client.post("/api/detect", content=form, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert endless.status_code == 400


def test_a_wrong_method_is_told_the_right_one(client):
    answer = client.get("/api/detect")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_the_classes_and_the_health_of_the_server_are_told(client):
    told = client.get("/api/classes").json()
    assert [(own["run"], own["name"]) for own in told["runs"]] == [(0, "first"), (1, "second"), (2, "broken")]
    assert told["runs"][0]["classes"][2] == {"label": 2, "name": "gear", "category_id": 30}
    assert told["max_bytes"] == 20_000
    before = client.get("/api/health").json()
    assert (before["status"], before["waiting"], before["most_waiting"]) == ("ok", 0, 64)
    client.post("/api/detect", content=png(), headers=IMAGE)
    assert client.get("/api/health").json()["answered"] == before["answered"] + 1


def test_the_description_names_every_refusal_and_its_model(client):
    described = client.get("/openapi.json").json()
    detect = described["paths"]["/api/detect"]["post"]
    assert set(detect["responses"]) == {"200", *"400 403 404 408 413 415 421 422 500 503 504".split()}
    for status, own in detect["responses"].items():
        model = own["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        assert model == ("Answer" if status == "200" else "Problem")
    assert {"image/jpeg", "multipart/form-data"} < set(detect["requestBody"]["content"])
    choices = next(own["schema"]["enum"] for own in detect["parameters"] if own["name"] == "run")
    assert choices == ["0", "1", "2", "first", "second", "broken"]
    assert "/home" not in json.dumps(described)


def test_the_page_is_sent_and_names_nothing_of_another_server(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert client.head("/").content == b""
