"""Sizes of far images: those of local files, read once, from few bytes; and what a listing tells."""

import json
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_factories import image_row, save_image, two_images
from far_servers import tar_of, zip_of
from megdet.data.check import check_dataset
from megdet.data.far import headers as far_headers
from megdet.data.far import reading
from megdet.data.far.folder import FarFile, folder_of
from megdet.data.headers import Lost, read_headers, read_stamped_headers
from megdet.errors import InputError

NAMES = ["a.jpg", "sub/b c.jpg", "ü#1.png", "t.tif", "w.webp", "g.gif", "big.png"]


def write_images(folder: Path) -> None:
    """Images of several kinds, some turned by EXIF, small and large."""
    save_image(folder / NAMES[0], 40, 30, orientation=6)
    save_image(folder / NAMES[1], 41, 30)
    save_image(folder / NAMES[2], 42, 30, orientation=3)
    save_image(folder / NAMES[3], 300, 200, orientation=6)
    save_image(folder / NAMES[4], 200, 144, orientation=8)
    save_image(folder / NAMES[5], 45, 30)
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3), np.uint8)
    Image.fromarray(noise).save(folder / NAMES[6])
    jpeg = Image.fromarray(noise[:50])
    exif = Image.Exif()
    exif[0x112], exif[0x9286] = 6, "x" * 9000  # a comment before the size
    jpeg.save(folder / "long.jpg", exif=exif)


def test_headers_over_the_web_are_those_of_the_files_and_are_read_once(tmp_path, cache_folder, server):
    write_images(server.folder)
    names = [*NAMES, "long.jpg"]
    local = read_headers(tmp_path / "local.json", server.folder, names)
    assert local[0].tolist() == [40, 30, 1]
    assert local[-1].tolist() == [90, 50, 1]
    far = folder_of(server.address)
    assert read_headers(tmp_path / "x.json", far, names).tolist() == local.tolist()
    assert [own.range for own in server.asked_for("big.png")] == ["bytes=0-4095"]
    assert [own.range for own in server.asked_for("long.jpg")] == ["bytes=0-4095", "bytes=0-65535"]
    assert [own.range for own in server.asked_for("t.tif")][-1] in ("bytes=0-1048575", "bytes=0-65535")
    num_asked = len(server.asked)
    assert read_headers(tmp_path / "x.json", far, names).tolist() == local.tolist()
    assert len(server.asked) == num_asked


def test_a_server_that_tells_no_parts_of_files_is_asked_once_for_each(tmp_path, cache_folder, server):
    write_images(server.folder)
    server.has_ranges = False
    names = [*NAMES, "long.jpg"]
    local = read_headers(tmp_path / "local.json", server.folder, names)
    assert read_headers(tmp_path / "x.json", folder_of(server.address), names).tolist() == local.tolist()
    assert sorted(own.name for own in server.asked) == sorted(names)


@pytest.mark.parametrize("archive_of", [zip_of, tar_of])
def test_headers_in_an_archive_are_those_of_the_files(tmp_path, cache_folder, archive_of):
    write_images(tmp_path / "images")
    names = [*NAMES, "long.jpg"]
    local = read_headers(tmp_path / "local.json", tmp_path / "images", names)
    for inside in ("", "photos/2017"):
        far = folder_of(archive_of(tmp_path / "images", tmp_path / f"{len(inside)}.archive", inside))
        assert read_headers(tmp_path / "x.json", far, names).tolist() == local.tolist()


@pytest.fixture
def bucket(tmp_path, cache_folder):
    """A folder of two images in fsspec's memory, which lists its files as object stores do, and its local twin."""
    for name in ("a.jpg", "b.jpg"):
        save_image(tmp_path / "images" / name, 40, 30)
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/bucket/{name}": (tmp_path / "images" / name).read_bytes() for name in ("a.jpg", "b.jpg")})
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def test_a_listing_tells_a_changed_file_and_a_missing_one(tmp_path, bucket, monkeypatch):
    file, far = tmp_path / "x.json", folder_of("memory://bucket")
    read: list[str] = []
    real = far_headers.far_header
    monkeypatch.setattr(far_headers, "far_header", lambda own: read.append(own.file_name) or real(own))
    first = read_stamped_headers(file, far, ["a.jpg", "b.jpg"])
    assert first.headers.tolist() == [[30, 40, 0]] * 2
    assert sorted(read) == ["a.jpg", "b.jpg"]
    again = read_stamped_headers(file, far, ["a.jpg", "b.jpg"])
    assert (again.stamps == first.stamps).all()
    assert len(read) == 2
    bucket.pipe("/bucket/b.jpg", save_image(tmp_path / "new.jpg", 50, 60).read_bytes())
    changed = read_stamped_headers(file, far, ["a.jpg", "b.jpg"])
    assert changed.headers.tolist() == [[30, 40, 0], [60, 50, 0]]
    assert read[2:] == ["b.jpg"]
    assert changed.stamps[:, 1].tolist() == [len(bucket.cat("/bucket/a.jpg")), len(bucket.cat("/bucket/b.jpg"))]
    with pytest.raises(
        InputError, match=r"memory://bucket: 1 of 2 images of .*x.json are missing, the first is 'c.jpg'"
    ):
        read_headers(file, far, ["a.jpg", "c.jpg"])
    with pytest.raises(InputError, match=r"2 of 2 images of .* are missing.*wrong image folder"):
        read_headers(file, folder_of("memory://no/such"), ["a.jpg", "b.jpg"])


def test_what_was_read_before_an_interruption_is_not_read_again(tmp_path, cache_folder, server, monkeypatch):
    for number in range(6):
        save_image(server.folder / f"{number}.jpg", 40 + number, 30)
    names = [f"{number}.jpg" for number in range(6)]
    real = far_headers.far_header

    def interrupted(file: FarFile):
        if file.file_name == "4.jpg":
            raise KeyboardInterrupt
        return real(file)

    monkeypatch.setattr(far_headers, "THREADS", 1)
    monkeypatch.setattr(far_headers, "far_header", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_headers(tmp_path / "x.json", folder_of(server.address), names)
    monkeypatch.setattr(far_headers, "far_header", real)
    server.asked.clear()
    found = read_headers(tmp_path / "x.json", folder_of(server.address), names)
    assert found.tolist() == [[30, 40 + number, 0] for number in range(6)]
    assert {own.name for own in server.asked} == {"4.jpg", "5.jpg"}


def test_after_an_interruption_no_thread_asks_again(tmp_path, cache_folder, server, monkeypatch):
    monkeypatch.setattr(reading, "_FIRST_PAUSE", 60.0)  # the test would take minutes
    server.fault_of = lambda _: 503
    names = [f"{number}.jpg" for number in range(8)]
    real = far_headers.far_header

    def interrupted(file: FarFile):
        while len(server.asked) < 7:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(far_headers, "far_header", lambda own: (interrupted if own.file_name == "0.jpg" else real)(own))
    with pytest.raises(KeyboardInterrupt):
        read_headers(tmp_path / "x.json", folder_of(server.address), names)
    assert len(server.asked) == 7


def test_a_lost_far_image_has_the_size_in_the_annotations_and_is_asked_for_at_the_next_start(
    tmp_path, cache_folder, server
):
    save_image(server.folder / "a.jpg", 40, 30)
    lost = Lost(np.array([[30.0, 40.0], [20.0, 25.0]]), 1)
    far = folder_of(server.address)
    found = read_stamped_headers(tmp_path / "x.json", far, ["a.jpg", "b.jpg"], lost)
    assert found.headers.tolist() == [[30, 40, 0], [20, 25, 0]]
    save_image(server.folder / "b.jpg", 26, 20)
    assert read_headers(tmp_path / "x.json", far, ["a.jpg", "b.jpg"]).tolist() == [[30, 40, 0], [20, 26, 0]]


def test_many_headers_have_a_line_of_progress_now_and_then(server, monkeypatch, caplog):
    monkeypatch.setattr(far_headers.time, "monotonic", iter([0.0, 4.0, 11.0, 12.0, 21.5]).__next__)
    progress = far_headers.Progress(folder_of(server.address), 440)
    for _ in range(4):
        progress.one_more()
    first, second = (record.getMessage() for record in caplog.records)
    assert f"{server.address}: sizes of 2 of 440 images read (0 a second, 40 minutes left)" in first
    assert "sizes of 4 of 440" in second


def test_check_reads_what_the_server_has_and_finds_each_fault(tmp_path, cache_folder, server):
    document = two_images()
    document["images"] += [image_row(1, "lost.jpg"), image_row(2, "cut.jpg")]
    for name in ("a.jpg", "b.jpg", "cut.jpg"):
        save_image(server.folder / name, 40, 30)
    whole = (server.folder / "cut.jpg").read_bytes()
    (server.folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x.json").write_text(json.dumps(document))
    problems = check_dataset(tmp_path / "x.json", folder_of(server.address))
    fatal = {problem.image_id: problem.message for problem in problems if problem.fatal}
    assert fatal.keys() == {1, 2}
    assert fatal[1].startswith(f"{server.address}/lost.jpg: no such file on the server (404)")
    assert fatal[2].startswith(f"{server.address}/cut.jpg: cannot be read as an image")
    assert all(len(server.asked_for(name)) == 1 for name in ("a.jpg", "b.jpg", "lost.jpg", "cut.jpg"))
