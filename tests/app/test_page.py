"""The page in a real browser, over a real server; its detectors find what is known."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Browser, Page, expect

from app_servers import CLASSES, png, served, serving, three_objects
from browsers import chromium, needs_chromium

_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
_DROP = """([content, name, type]) => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(content)], name, {type}));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.getElementById("drop").dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true}));
  }
}"""
_COLOURS = """(canvas, points) => {
  const copy = document.createElement("canvas"), context = copy.getContext("2d", {willReadFrequently: true});
  [copy.width, copy.height] = [canvas.width, canvas.height];
  context.drawImage(canvas, 0, 0);
  return points.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3));
}"""

pytestmark = needs_chromium


def second(images):
    return [replace(own[:2], scores=own.scores[:2] / 2) for own in three_objects(images, with_masks=True)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=60_000)  # the machine may be busy
    with chromium(*_CAMERA) as own:
        yield own


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """The page of two runs; at the end it must have complained of nothing and asked no other server."""
    complaints: list[str] = []
    asked: list[str] = []
    runs = [served(), replace(served(second, "<i>second</i>"), has_masks=True)]
    with serving(*runs) as (address, _):
        context = browser.new_context(accept_downloads=True, permissions=["camera"])
        context.set_default_timeout(60_000)
        own = context.new_page()
        own.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        own.on("pageerror", lambda error: complaints.append(str(error)))
        own.on("request", lambda request: asked.append(request.url))
        own.goto(address)
        own.locator("article").nth(1).wait_for()
        yield own
        context.close()
    assert complaints == []
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


def drop(page, content: bytes, name: str = "a.png", kind: str = "image/png") -> None:
    page.evaluate(_DROP, [list(content), name, kind])


def statuses(page):
    return [page.locator(".status").nth(number) for number in range(2)]


def set_score(page, score: float) -> None:
    page.locator("#score").fill(str(score))


def test_a_dropped_image_is_shown_with_what_both_runs_find_and_the_slider_needs_no_new_request(page):
    drop(page, png(300, 400))
    first, other = statuses(page)
    expect(first).to_contain_text("2 of 3 objects shown; detected in ")
    expect(other).to_contain_text("0 of 2 objects shown; detected in ")
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    set_score(page, 0.25)
    expect(page.locator("#score-shown")).to_have_text("0.25")
    expect(first).to_contain_text("3 of 3 objects")
    expect(other).to_contain_text("2 of 2 objects")
    set_score(page, 0.95)
    expect(first).to_contain_text("0 of 3 objects")
    assert requests == []


def test_boxes_and_masks_are_drawn_where_they_are(page):
    drop(page, png(30, 40))  # sixteen pixels of the canvas for one of the image
    set_score(page, 0.2)
    expect(statuses(page)[1]).to_contain_text("2 of 2 objects")
    first, other = (page.locator("canvas").nth(number) for number in range(2))
    assert [first.evaluate("own => own.width"), first.evaluate("own => own.height")] == [640, 480]
    gray, orange, blue = [200, 200, 200], [0xE6, 0x9F, 0x00], [0x56, 0xB4, 0xE9]
    in_mask, left_edge, right_edge, nowhere = (60, 88), (16, 150), (400, 240), (560, 400)
    assert first.evaluate(_COLOURS, [in_mask, left_edge, right_edge, nowhere]) == [gray, orange, blue, gray]
    found = other.evaluate(_COLOURS, [in_mask, left_edge, right_edge, nowhere])
    assert found[1:] == [orange, blue, gray]
    assert found[0] == pytest.approx([0.55 * 200 + 0.45 * channel for channel in orange], abs=2)


def test_classes_are_chosen_without_a_new_request_and_their_names_are_text(page):
    drop(page, png())
    first = statuses(page)[0]
    set_score(page, 0.1)
    expect(first).to_contain_text("3 of 3 objects")
    expect(page.locator(".chip").first).to_have_text(f"{CLASSES[0]}1 / 1")
    page.get_by_label(CLASSES[0]).uncheck()
    expect(first).to_contain_text("2 of 3 objects")
    page.get_by_role("button", name="None").press("Enter")
    expect(first).to_contain_text("0 of 3 objects")
    page.get_by_role("button", name="All").press("Space")
    expect(first).to_contain_text("3 of 3 objects")
    page.locator("summary").first.press("Enter")
    expect(page.locator("tbody").first.locator("tr").first).to_contain_text(CLASSES[0])
    assert page.locator("tbody .swatch").first.bounding_box()["width"] > 10
    assert page.locator("h2").all_text_contents() == ["first", "<i>second</i>"]
    assert page.locator("main b, main i").count() == 0


def test_what_is_shown_is_downloaded_as_rows_of_coco(page, tmp_path):
    drop(page, png(), "street.png")
    expect(statuses(page)[0]).to_contain_text("2 of 3 objects")
    with page.expect_download() as download:
        page.locator(".download").first.click()
    assert download.value.suggested_filename == "street-first.json"
    download.value.save_as(tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text()) == [
        {"image_id": "street.png", "category_id": 10, "bbox": [1, 2, 10, 10], "score": 0.9, "category": CLASSES[0]},
        {"image_id": "street.png", "category_id": 20, "bbox": [5, 5, 20, 15], "score": 0.6, "category": CLASSES[1]},
    ]


def test_a_chosen_file_and_a_pasted_one_are_looked_at(page):
    page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": png(50, 60)})
    expect(statuses(page)[0]).to_contain_text("2 of 3 objects")
    page.evaluate(
        """content => { const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(content)], "c.png", {type: "image/png"}));
        dispatchEvent(new ClipboardEvent("paste", {clipboardData: data})); }""",
        list(png(50, 60, 20)),
    )
    expect(statuses(page)[0]).to_contain_text("0 of 3 objects")


def test_the_camera_gives_a_picture_and_frames_one_after_another(page):
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take a picture").click()
    expect(statuses(page)[0]).to_contain_text("of 3 objects shown")
    page.get_by_role("button", name="Live").click()
    for _ in range(3):
        with page.expect_response("**/api/detect?run=0") as answered:
            pass
        assert answered.value.ok
    page.get_by_role("button", name="Stop the camera").click()
    expect(page.locator("video")).to_be_hidden()


def test_a_file_too_large_is_refused_before_it_is_sent(page):
    page.evaluate("() => { maxBytes = 10; }")
    drop(page, png())
    expect(page.get_by_role("alert")).to_contain_text("more than the 0 that are taken")
