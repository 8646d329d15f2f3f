"""Addresses of image folders: which are taken, how they are written, and that they show no secrets."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_factories import two_images, write_set
from megdet.addresses import is_address, masked
from megdet.cli.main import main
from megdet.data.coco import load_coco, training_set
from megdet.data.far.folder import FarFile, FarFolder, folder_of
from megdet.data.far.protocols import in_folder, is_listed
from megdet.data.loader import group_batches
from megdet.data.plan import evaluation_plan
from megdet.errors import InputError
from megdet.recipe import Data
from megdet.recipe_check import check_recipe
from small_runs import CPU, small_recipe, write_small_set


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("s3://bucket/train", True),
        ("zip://a::s3://bucket/a.zip", True),
        ("simplecache::https://host/a", True),
        ("data/train", False),
        ("/data/a::b", False),
        ("C:\\data", False),
        ("a folder://x", False),
    ],
)
def test_an_address_begins_with_a_protocol(text, found):
    assert is_address(text) == found


@pytest.mark.parametrize(
    ("text", "name", "whole"),
    [
        ("https://host/train", "a b/1.jpg", "https://host/train/a b/1.jpg"),
        ("s3://bucket", "1.jpg", "s3://bucket/1.jpg"),
        ("zip://::/data/a.zip", "1.jpg", "zip://1.jpg::/data/a.zip"),
        ("zip:///data/a.zip", "1.jpg", "zip://1.jpg::/data/a.zip"),
        ("tar://photos/::/data/a.tar", "x/1.jpg", "tar://photos/x/1.jpg::/data/a.tar"),
    ],
)
def test_a_file_is_called_by_its_own_address(text, name, whole):
    folder = folder_of(text)
    assert isinstance(folder, FarFolder)
    assert str(folder / name) == whole
    assert FarFolder(whole).as_file().file_name == name.rpartition("/")[2]
    assert str(FarFolder(whole).as_file()) == whole


def test_a_path_stays_a_path_and_a_file_address_becomes_one(tmp_path):
    assert folder_of("data/train") == Path("data/train")
    assert folder_of(tmp_path) == tmp_path
    assert folder_of(f"file://{tmp_path}/a%20b") == tmp_path / "a b"


def test_an_archive_beside_the_working_directory_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = folder_of("zip://in::a.zip")
    assert isinstance(folder, FarFolder)
    assert folder.address == f"zip://in::{tmp_path}/a.zip"


def test_copies_are_kept_of_what_a_network_brings_and_not_of_a_local_archive(tmp_path):
    data = replace(Data(), cache_folder=str(tmp_path), far_cache_gib=0.5, far_timeout=7.0, far_retries=2)
    web, local = folder_of("zip://::https://host/a.zip", data), folder_of("zip:///data/a.zip", data)
    assert web == FarFolder("zip://::https://host/a.zip", f"{tmp_path}/files", 1 << 29, 7.0, 2)
    assert isinstance(local, FarFolder)
    assert local.most_bytes == 0


SECRETS = [
    "https://me:s3cret@host/train",
    "https://s3cret@host/train",
    "sftp://me:s3cret@host/train",
    "zip://in::https://me:s3cret@host/a.zip",
    "https://host/train?token=s3cret",
]


@pytest.mark.parametrize("address", SECRETS)
def test_an_address_with_a_secret_is_refused_without_showing_it(tmp_path, address, capsys):
    with pytest.raises(InputError, match="would be kept in the run folder") as fault:
        folder_of(address)
    assert "s3cret" not in str(fault.value)
    recipe = small_recipe(tmp_path)
    with pytest.raises(InputError, match=r"^x: data.val_images is .*\*\*\*") as fault:
        check_recipe(replace(recipe, data=replace(recipe.data, val_images=address)), "x")
    assert "s3cret" not in str(fault.value)
    words = ["train", "demo", "--run", str(tmp_path / "run"), "--data.train_images", address]
    assert main(words) == 2
    assert "s3cret" not in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_a_user_without_a_password_is_no_secret_where_keys_are_usual():
    assert isinstance(folder_of("sftp://me@host/train"), FarFolder)


def test_secrets_of_addresses_inside_a_longer_text_are_masked():
    text = "403, message='Forbidden', url='https://a:b@host/x.jpg?sig=123'; and s3://c:d@bucket/y"
    assert masked(text) == "403, message='Forbidden', url='https://***@host/x.jpg?***'; and s3://***@bucket/y"


def test_annotations_at_an_address_are_refused_with_a_mend(tmp_path):
    recipe = small_recipe(tmp_path)
    with pytest.raises(InputError, match=r"data.train_annotations is s3://b/a.json: annotations are read from a file"):
        check_recipe(replace(recipe, data=replace(recipe.data, train_annotations="s3://b/a.json")), "x")


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("s3x://bucket/train", r"s3x://bucket/train: fsspec knows no protocol s3x://; did you mean 's3"),
        ("gs://bucket/train", r"gs://bucket/train: gs:// needs a library that is not installed: pip install 'megdet\["),
    ],
)
def test_a_protocol_that_cannot_be_used_here_is_refused_with_its_mend(
    tmp_path, cache_folder, monkeypatch, address, fault
):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    file, _ = write_set(tmp_path, two_images())
    with pytest.raises(InputError, match=fault):
        load_coco(file, folder_of(address), keep_empty=True)


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg"])
def test_a_file_name_never_leads_out_of_a_far_folder(tmp_path, cache_folder, server, name):
    document = two_images()
    document["images"][0]["file_name"] = name
    (tmp_path / "instances.json").write_text(json.dumps(document))
    for allowed in (False, True):
        with pytest.raises(
            InputError, match=r"image 7: file_name .* leads out of the image folder, which is an address"
        ):
            load_coco(
                tmp_path / "instances.json", folder_of(server.address), keep_empty=True, allow_outside_files=allowed
            )
    assert not server.asked


@pytest.mark.parametrize("name", ["http://evil/a.jpg", "s3://evil/a.jpg", "a.jpg?x=1", "a#b.jpg", "..%2fa.jpg", "a::b"])
def test_a_file_name_is_a_name_and_never_an_address(name):
    path = in_folder("http://host/train", name)
    assert path.startswith("http://host/train/")
    assert not {*path.removeprefix("http://host/train/")} & {*"?#:"}
    assert in_folder("bucket/train", name) == f"bucket/train/{name}"
    assert isinstance(FarFolder("http://host/train") / name, FarFile)


def test_only_web_servers_list_no_files():
    assert is_listed("s3://b/a")
    assert is_listed("zip://::https://host/a.zip")
    assert not is_listed("https://host/a")
    assert not is_listed("simplecache::https://host/a")


def test_a_local_folder_is_read_without_the_modules_of_far_ones(tmp_path, cache_folder, monkeypatch):
    for name in ("reading", "headers", "listing", "protocols", "copies"):
        monkeypatch.setitem(sys.modules, f"megdet.data.far.{name}", None)  # importing it would fail
    write_small_set(tmp_path, "train", 3)
    recipe = small_recipe(tmp_path)
    dataset = training_set(recipe.data, masks="none")
    assert dataset.stamps is None
    batches = list(group_batches(dataset, evaluation_plan(dataset.sizes, recipe), workers=0, device=CPU))
    assert sum(len(batch.image_index) for batch in batches) == 3
