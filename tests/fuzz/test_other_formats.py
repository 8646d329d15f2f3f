"""Recipes, Pascal VOC, YOLO and images: each reader gives a result or one clear line."""

import io
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from broken import STRANGE, broken_bytes, broken_json, broken_value
from data_factories import save_image
from fuzzing import Tally
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.yolo import convert_yolo
from megdet.data.headers import read_headers
from megdet.data.image import read_image
from megdet.data.sampling.image_weights import read_image_weights
from megdet.model.choice import make_detector
from megdet.recipe_file import dump_recipe, packaged_recipes, parse_recipe, recipe_keys

NUMBER = pytest.mark.parametrize("number", [40, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "many"])
_KEYS = st.sampled_from(recipe_keys())


@NUMBER
def test_recipes(number: int) -> None:
    trees = [yaml.safe_load(text) for name, text in packaged_recipes().items() if name in ("demo", "megdet-r50")]
    built = Tally("recipes, detectors")

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
        strange = STRANGE | st.sampled_from((2**31 - 1, 2**20, "none", "group", "sgd"))
        tree = draw(st.sampled_from(trees))
        if draw(st.booleans()):
            key = draw(_KEYS)
            tree = {**tree, **_nested(key, draw(strange))}
        if draw(st.booleans()):
            text = draw(broken_json(tree, strange)).decode("utf-8", "surrogateescape")
        else:
            text = yaml.safe_dump(draw(broken_value(tree, strange)))
            text = draw(broken_bytes(text.encode("utf-8", "surrogatepass"))).decode("utf-8", "surrogateescape")
        overrides = draw(st.dictionaries(_KEYS, st.text(max_size=8) | strange.map(str), max_size=1))
        return text, overrides

    def check(case: tuple[str, dict[str, str]]) -> None:
        text, overrides = case
        names = ("mine.yaml", *(f"--{key}" for key in overrides))
        if not tally.case(lambda: parse_recipe(text, "mine.yaml", overrides), *names):
            recipe = parse_recipe(text, "mine.yaml", overrides)
            assert parse_recipe(dump_recipe(recipe), "again") == recipe
            with torch.device("meta"):
                built.case(lambda: make_detector(recipe, 3), "model", "backbone")

    tally = Tally("recipes")
    tally.fuzz(cases(), number, check)
    print(built)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


_WORD = st.one_of(
    st.sampled_from(("1", "0", "-1", "40", "1e30", "1e31", "nan", "inf", "-1e308", "9" * 400, "", "\x1b[2J", "cat")),
    st.sampled_from(
        ("&lt;", "&x;", "&#0;", "&#x1b;", "<![CDATA[", "../../etc/passwd", "/etc/passwd", "a.jpg", "x" * 300)
    ),
    st.text(max_size=6),
)
_PROLOGUE = st.sampled_from(
    (
        *("", "", "", '<?xml version="1.0" encoding="utf-8"?>', '<?xml version="1.0" encoding="gb2312"?>'),
        '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://localhost/x"> %x;]>',
        '<!DOCTYPE a [<!ATTLIST object x CDATA "' + "x" * 10_000 + '">]>',
        *('<!DOCTYPE a SYSTEM "http://localhost/x">', '<?xml version="1.0" encoding="utf-7"?>', "<?php x ?>"),
    )
)


@st.composite
def voc_files(draw: st.DrawFn) -> bytes:
    def element(name: str, content: str) -> str:
        kind = draw(st.integers(0, 39))
        if kind == 0:
            return ""
        if kind == 1:
            content = draw(_WORD)
        if kind == 2:
            return f"<{name}>" * draw(st.sampled_from((2, 3000))) + content
        return f"<{name}>{content}</{name}>" * (2 if kind == 3 else 1)

    box = "".join(
        element(name, value) for name, value in (("xmin", "1"), ("ymin", "2"), ("xmax", "9.5"), ("ymax", "9"))
    )
    row = element("name", "cat") + element("difficult", "0") + element("bndbox", box)
    size = element("width", "40") + element("height", "30") + element("depth", "3")
    objects = "".join(element("object", row) for _ in range(draw(st.integers(0, 3))))
    whole = element("annotation", element("filename", "a.jpg") + element("size", size) + objects)
    text = (draw(_PROLOGUE) + whole).encode(draw(st.sampled_from(("utf-8",) * 5 + ("utf-16",))), "surrogatepass")
    return draw(broken_bytes(text)) if draw(st.integers(0, 3)) == 0 else text


@NUMBER
def test_voc(tmp_path: Path, number: int) -> None:
    save_image(tmp_path / "JPEGImages/a.jpg", 40, 30)
    save_image(tmp_path / "JPEGImages/b.jpg", 40, 30)
    file, other = tmp_path / "Annotations/a.xml", tmp_path / "Annotations/b.xml"
    file.parent.mkdir()
    other.write_text("<annotation><filename>b.jpg</filename></annotation>")
    listing = tmp_path / "ImageSets/Main/train.txt"
    listing.parent.mkdir(parents=True)
    tally = Tally("Pascal VOC")

    def check(case: tuple[bytes, bytes]) -> None:
        for path, content in zip((file, listing), case, strict=True):
            path.write_bytes(content)
        names = (file.name, other.name, listing.name, "Annotations", "the split train")
        tally.case(partial(convert_voc, tmp_path, tmp_path / "out"), *names)

    lists = (
        st.just(b"a\nb\n") | broken_bytes(b"a\nb 1\n") | st.sampled_from((b"../../etc/passwd", b"/etc/passwd", b".."))
    )
    tally.fuzz(st.tuples(voc_files(), lists), number, check)


_LINE = st.lists(
    st.sampled_from(("0", "1", "0.5", "0.25", "-0.1", "2", "300", "1e30", "1e-300", "nan", "inf", "x", "9" * 400)),
    max_size=9,
).map(" ".join)


@NUMBER
def test_yolo(tmp_path: Path, number: int) -> None:
    save_image(tmp_path / "images/a.jpg", 40, 30)
    label, names = tmp_path / "labels/a.txt", tmp_path / "data.yaml"
    label.parent.mkdir()
    tally = Tally("YOLO")
    sound = {"path": "../data", "train": "images", "nc": 2, "names": {"0": "ant", "1": "bee"}}
    bombs = st.sampled_from((b"a: &a [x, x]\nb: [*a, *a]", b"names: !!python/object:os.system ['true']", b"names: [a"))

    def check(case: tuple[bytes, bytes]) -> None:
        label.write_bytes(case[0])
        names.write_bytes(case[1])
        tally.case(partial(convert_yolo, tmp_path, tmp_path / "out"), label.name, names.name)

    lines = st.lists(st.just("0 0.5 0.5 0.2 0.2") | _LINE, max_size=3).map("\n".join).map(str.encode)
    labels = lines | broken_bytes(b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.3 0.4\n")
    tally.fuzz(st.tuples(labels, broken_json(sound) | st.just(b"names: [ant, bee]") | bombs), number, check)


def _pictures() -> list[bytes]:
    """Small sound files of every format that is opened, in its kinds of pixels."""
    draw, found = np.random.default_rng(0), list[bytes]()
    picture = Image.fromarray(draw.integers(0, 256, (30, 40, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    for kind, modes, options in (
        ("JPEG", ("RGB", "L", "CMYK"), {"exif": exif}),
        ("JPEG", ("RGB",), {"progressive": True}),
        ("PNG", ("RGB", "RGBA", "L", "P", "1", "LA"), {"exif": exif}),
        ("BMP", ("RGB", "L", "1"), {}),
        ("GIF", ("P",), {"transparency": 1}),
        ("PPM", ("RGB", "L", "1"), {}),
        ("WEBP", ("RGB", "RGBA"), {}),
        ("TIFF", ("RGB", "CMYK", "1"), {}),
        ("TIFF", ("RGB",), {"compression": "tiff_lzw"}),
        ("TIFF", ("RGB",), {"compression": "tiff_adobe_deflate"}),
        ("TIFF", ("RGB",), {"compression": "jpeg"}),
    ):
        for mode in modes:
            buffer = io.BytesIO()
            picture.convert("RGB").convert(mode).save(buffer, kind, **options)
            found.append(buffer.getvalue())
    return found


def _with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what is in them, so that a changed number is believed."""
    found, place = bytearray(content), 8
    while content.startswith(b"\x89PNG") and place + 12 <= len(found):
        end = place + 8 + int.from_bytes(found[place : place + 4], "big")
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(found)


@NUMBER
@pytest.mark.filterwarnings("ignore")  # Pillow's words about damaged files
def test_images(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, headers = tmp_path / "a.jpg", Tally("images, headers")
    tally = Tally("images")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        headers.case(lambda: read_headers(tmp_path / "x.json", tmp_path, [path.name]), path.name)
        tally.case(lambda: read_image(path), path.name)

    pictures = st.sampled_from(_pictures())
    cases = pictures.flatmap(lambda own: broken_bytes(own, 80) | broken_bytes(own)).map(_with_checksums)
    tally.fuzz(cases, number, check)
    print(headers)


@NUMBER
def test_weights_of_images(number: int, tmp_path: Path) -> None:
    table, names = tmp_path / "weights.csv", ("a.jpg", "b.jpg", "", "1")
    line = st.lists(_WORD, min_size=2, max_size=3).map(",".join)
    sound = st.tuples(st.sampled_from(names), st.sampled_from(("1", "0", "0.5", "1e6"))).map(",".join)
    header = st.sampled_from(("file_name,weight", "weight;file_name", "file_name,weight,file_name", "a\tweight"))
    lines = st.tuples(header, st.lists(sound | line, max_size=4)).map(lambda own: "\n".join((own[0], *own[1])))
    texts = lines.map(lambda text: text.encode("utf-8", "surrogatepass"))
    tally = Tally("weights of images")

    def check(content: bytes) -> None:
        table.write_bytes(content)

        def read() -> None:
            weights = read_image_weights(table, Path("all.json"), names)
            known = weights[~np.isnan(weights)]
            assert ((known >= 0) & (known <= 1e6)).all()

        tally.case(read, "weights.csv")

    tally.fuzz(texts.flatmap(lambda content: st.just(content) | broken_bytes(content)), number, check)
