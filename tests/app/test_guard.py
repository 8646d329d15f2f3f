"""Who may ask, and under which names."""

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app_servers import png, served
from megdet.app.application import make_application
from megdet.app.batcher import Batcher
from megdet.app.requests import Limits


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with Batcher([served()]) as batcher:
        yield TestClient(make_application(batcher, Limits(), ["Demo.Example"]), "http://localhost")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "192.168.1.7:8000", "[::1]:8000", "demo.example:443"]
)
def test_localhost_numeric_addresses_and_allowed_names_are_served(client, host):
    assert client.get("/api/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "evil@localhost", "localhost/", ""),
        *(
            "localhost:8000:9",
            "localhost:x",
            "localhost evil",
            "[::1].evil.example",
            "1.2.3",
            "0x7f.1",
            "demo.example.",
        ),
    ],
)
def test_any_other_name_is_refused_so_that_none_can_be_made_to_point_here(client, host):
    for method, path in (("GET", "/"), ("GET", "/api/health"), ("POST", "/api/detect"), ("GET", "/openapi.json")):
        assert client.request(method, path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:81"},
        {"Origin": "file://localhost"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_a_page_of_another_origin_may_send_no_image_and_read_nothing(client, headers):
    image = {"Content-Type": "image/png", **headers}
    assert client.post("/api/detect", content=png(), headers=image).status_code == 403
    assert client.get("/api/classes", headers=headers).status_code == 403
    assert client.options("/api/detect", headers=headers).status_code == 403
    assert "access-control-allow-origin" not in client.get("/api/classes", headers=headers).headers


@pytest.mark.parametrize("headers", [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {}])
def test_the_own_page_and_programs_may(client, headers):
    image = {"Content-Type": "image/png", **headers}
    assert client.post("/api/detect", content=png(), headers=image).status_code == 200


def test_a_link_of_another_page_may_lead_to_the_page(client):
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status_code == 403


def test_only_the_pages_own_script_and_style_may_run(client):
    answer = client.get("/")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert len(found) == 1
        digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<[^>]* (style|on\w+)=", answer.text), "the policy forbids them"
    assert answer.headers["x-frame-options"] == "DENY"
