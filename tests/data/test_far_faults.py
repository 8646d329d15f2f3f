"""A server that fails and is slow: what is asked again, what is not, and what the user reads."""

import re
import sys
import zipfile
from dataclasses import replace
from typing import Any

import pytest
import torch

from data_factories import save_image, two_images, write_set
from far_servers import FarServer, every, far_server, zip_of
from megdet.data.coco import load_coco, training_set
from megdet.data.far.faults import lasting_fault, passing_fault
from megdet.data.far.folder import FarFolder, folder_of
from megdet.data.far.opening import far_content
from megdet.data.far.reading import notices_of, reader_of
from megdet.data.image import read_image
from megdet.data.loader import LoadingFaults, training_batches
from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Data, Recipe
from megdet.recipe_check import check_recipe
from small_runs import CPU, small_recipe, write_small_set


def folder_at(server: FarServer, **changes: Any) -> FarFolder:
    """The server's folder, without copies."""
    return FarFolder(server.address, **changes)


@pytest.mark.parametrize("fault", [503, 429, "reset", "short"])
def test_a_fault_that_may_pass_is_asked_again_and_the_user_reads_of_it_once(server, fault):
    names = [f"{number}.jpg" for number in range(6)]
    for number, name in enumerate(names):
        save_image(server.folder / name, 40 + number, 30)
    server.fault_of = every(3, fault)
    folder = folder_at(server)
    for number, name in enumerate(names):
        assert far_content(folder / name) == (server.folder / name).read_bytes()
        assert read_image(folder / name).shape == (30, 40 + number, 3)
    (notice,) = notices_of(folder)
    said = f"answers {fault}" if isinstance(fault, int) else "cut short|the connection failed"
    assert len(server.asked) == 18  # twelve, and every third again
    assert re.search(said, notice)
    assert notice.startswith(f"{server.address}: ")
    assert notices_of(folder) == []


@pytest.mark.parametrize(("status", "said"), [(404, "no such file on the server"), (403, "refuses it"), (410, "410")])
def test_a_fault_that_lasts_is_asked_once_and_names_the_address(server, status, said):
    save_image(server.folder / "a.jpg", 40, 30)
    server.fault_of = every(1, status)
    with pytest.raises(InputError, match=f"^{server.address}/a.jpg: .*{said}"):
        read_image(folder_at(server) / "a.jpg")
    assert len(server.asked) == 1


def test_a_server_that_stays_away_is_given_up_and_the_message_says_after_how_many_tries(server):
    server.fault_of = every(1, 500)
    message = r"the server answers 500, 3 times in a row \(data.far_retries 2\): is the server up"
    with pytest.raises(InputError, match=message):
        read_image(folder_at(server, retries=2) / "a.jpg")
    assert len(server.asked) == 3


def test_a_slow_answer_is_given_up_and_the_message_names_the_time(server):
    save_image(server.folder / "a.jpg", 40, 30)
    server.fault_of = lambda number: "slow" if number < 2 else None
    folder = folder_at(server, timeout=0.25, retries=1)
    with pytest.raises(InputError, match=r"no whole answer within 0.25 s \(data.far_timeout\), 2 times in a row"):
        read_image(folder / "a.jpg")
    assert read_image(folder / "a.jpg").shape == (30, 40, 3)  # the third request is answered at once


def test_a_server_that_is_not_there_is_named(tmp_path, short_pauses):
    with far_server(tmp_path) as gone:
        folder = folder_at(gone, retries=1)
    with pytest.raises(InputError, match=r"^http://127.0.0.1:\d+/a.jpg: the connection failed .*2 times in a row"):
        read_image(folder / "a.jpg")


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    with pytest.raises(
        InputError, match=r"http:// needs a library that is not installed: pip install 'megdet\[http\]'"
    ):
        read_image(FarFolder("http://127.0.0.1:9/x") / "a.jpg")


def test_an_archive_that_is_missing_or_broken_is_refused(tmp_path, cache_folder, short_pauses):
    file, images = write_set(tmp_path, two_images())
    with pytest.raises(InputError, match=r"^zip://::.*none.zip: no such archive"):
        load_coco(file, folder_of(f"zip://::{tmp_path}/none.zip"), keep_empty=True)
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"bad.zip: the archive cannot be read .*is it whole"):
        load_coco(file, folder_of(f"zip://::{tmp_path}/bad.zip"), keep_empty=True)
    address = zip_of(images, tmp_path / "a.zip")
    damaged = bytearray((tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        damaged[archive.getinfo("b.jpg").header_offset + 60] ^= 255
    (tmp_path / "a.zip").write_bytes(damaged)
    with pytest.raises(InputError, match=r"b.jpg::.*a.zip: the archive cannot be read .*(CRC|crc)"):
        read_image(folder_of(address) / "b.jpg")


def test_a_zip_on_a_server_survives_its_faults(tmp_path, cache_folder, server):
    file, images = write_set(tmp_path, two_images())
    zip_of(images, server.folder / "a.zip", "in")
    server.fault_of = lambda number: 503 if number in (0, 1) else None  # of both ways to ask for its size
    dataset = load_coco(file, folder_of(f"zip://in::{server.address}/a.zip"), keep_empty=True)
    assert dataset.sizes.tolist() == load_coco(file, images, keep_empty=True).sizes.tolist()


def test_faults_of_object_stores_are_told_apart():
    class ClientError(Exception):
        def __init__(self, status: int) -> None:
            super().__init__(f"An error occurred ({status}) when calling GetObject")
            self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}

    class HttpError(Exception):  # of gcsfs
        def __init__(self, code: int) -> None:
            self.code = code

    class NoCredentialsError(Exception):
        pass

    assert "(404)" in lasting_fault(ClientError(404))
    assert "(403)" in lasting_fault(HttpError(403))
    assert "right to read" in lasting_fault(PermissionError("Access Denied"))
    assert "right to read" in lasting_fault(NoCredentialsError("Unable to locate credentials"))
    for error in (ClientError(503), HttpError(500), OSError("SlowDown"), ConnectionResetError(104, "reset")):
        assert lasting_fault(error) == ""
    assert passing_fault(ClientError(503), 1.0) == "the server answers 503"
    assert "s3cret" not in passing_fault(OSError("cannot connect to https://a:s3cret@host/x?sig=s3cret"), 1.0)


@pytest.fixture
def recipe(tmp_path, cache_folder, server) -> Recipe:
    """Ten images to train on, on the server; no copies."""
    write_small_set(tmp_path, "train", 10)
    (tmp_path / "served").rmdir()
    (tmp_path / "train").rename(tmp_path / "served")
    data = replace(
        small_recipe(tmp_path).data,
        train_images=server.address,
        cache_folder=str(tmp_path / "copies"),
        far_cache_gib=0.0,
        far_retries=2,
    )
    return small_recipe(tmp_path, data=data)


def batches(recipe: Recipe) -> tuple[list[torch.Tensor], LoadingFaults]:
    dataset, faults = training_set(recipe.data, masks="none"), LoadingFaults()
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, 1, 1)
    plan = TrainingPlan(dataset.sizes, recipe)
    found = training_batches(dataset, plan, layout, 0, (0, 3), workers=0, device=CPU, faults=faults)
    return [batch.pixels for batch in found], faults


def test_batches_from_a_server_that_fails_are_those_of_one_that_does_not(recipe, server):
    sound, _ = batches(recipe)
    num_asked = len(server.asked)
    faults = (503, None, None, "reset", None, None, None, "short", None)
    server.fault_of = lambda number: faults[number % len(faults)]
    for expected, found in zip(sound, batches(recipe)[0], strict=True):
        assert torch.equal(expected, found)
    assert len(server.asked) > 2 * num_asked - 10  # headers were not read again, failed requests were made again


def test_an_image_that_is_gone_stops_the_run_or_is_replaced_as_a_local_one_is(recipe, server):
    batches(recipe)
    (server.folder / "5.png").unlink()
    message = r"/5.png: no such file on the server .* put a sound image of \d+ x \d+ pixels on its server and give"
    with pytest.raises(InputError, match=message):
        batches(recipe)
    data = replace(recipe.data, unreadable="replace", most_replaced=0.3)
    _, faults = batches(replace(recipe, data=data))
    assert {own.image for own in faults.replaced} == {5}
    assert "no such file on the server (404)" in faults.replaced[0].reason


def test_a_time_limit_of_zero_is_refused(tmp_path):
    recipe = small_recipe(tmp_path)
    with pytest.raises(InputError, match=r"data.far_timeout is 0.0: no request can be answered in no time"):
        check_recipe(replace(recipe, data=replace(Data(), far_timeout=0.0)), "x")


def test_a_reader_belongs_to_its_process(server, monkeypatch):
    folder = folder_at(server)
    mine = reader_of(folder)
    assert reader_of(folder) is mine
    monkeypatch.setattr("megdet.data.far.reading.os.getpid", lambda: -1)
    assert reader_of(folder) is not mine
