"""Run folders and weights of other people: a detector or one clear line."""

import hashlib
import io
import itertools
import json
import pickle
import pickletools
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from broken import STRANGE, broken_bytes, broken_json, broken_value
from fuzzing import Tally
from megdet.inference.trained import load_detector
from megdet.model.weight_file import read_tensors
from megdet.run_folder.checkpoint_files import latest_checkpoint
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.run_state import RunState
from small_runs import CPU, save_run, small_recipe

NUMBER = pytest.mark.parametrize("number", [30, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "many"])
_LENGTHS = st.sampled_from((0, 1, 2, 100, 2**24, 2**31, 2**40, 2**63 - 1))


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def broken_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A file whose header lies about lengths, shapes, number formats and places, or whose numbers are damaged."""
    header, numbers = _split(content)
    strange = STRANGE | _LENGTHS | st.sampled_from(("F64", "BF16", "F8_E4M3", "BOOL", "I64", "U16", "C64"))
    text = draw(broken_json(header, strange)) if draw(st.booleans()) else json.dumps(header).encode()
    length = draw(st.just(len(text)) | st.just(len(text)) | _LENGTHS)
    if draw(st.integers(0, 4)) == 0:
        numbers = draw(broken_bytes(numbers))
    return struct.pack("<Q", length) + text + numbers


@NUMBER
def test_run_folders(tmp_path: Path, number: int) -> None:
    folder, _ = save_run(tmp_path / "run", small_recipe(tmp_path))
    path = latest_checkpoint(folder)
    assert path is not None
    files = {name: path / name for name in ("state.json", "model.safetensors", "optimizer.safetensors")}
    sound = {name: file.read_bytes() for name, file in files.items()}
    state, recipe = json.loads(sound["state.json"]), folder.recipe.read_text()
    metrics = [{"step": 1, "loss": 1.5}, {"step": 2, "loss": "NaN"}]
    tally = Tally("checkpoints")

    @st.composite
    def cases(draw: st.DrawFn) -> tuple[bytes, bytes, bytes, bytes]:
        what = draw(st.sampled_from(("state", "model", "model", "recipe", "metrics")))
        model, text = sound["model.safetensors"], recipe.encode()
        content: Any = state
        if what == "model":
            model = draw(broken_safetensors(model))
        if what == "recipe":
            text = draw(broken_bytes(text))
        if draw(st.integers(0, 4)):  # by somebody who knows what the check is made of
            content = json.loads(json.dumps(state))
            content["tensors"]["model"] = hashlib.sha256(model).hexdigest()
            if what == "state":
                more = st.sampled_from((["a"] * 3, ["x"] * 300_000, [1] * 3, [2**70] * 3, ["a"] * 4))
                content["state"] = draw(broken_value(content["state"], STRANGE | more))
            with suppress(msgspec.ValidationError, UnicodeEncodeError):
                written_state = msgspec.convert(content["state"], RunState)
                text_of_check = msgspec.json.encode(
                    [content["format"], content["tensors"], written_state], order="deterministic"
                )
                content["check"] = hashlib.sha256(text_of_check).hexdigest()
            written = json.dumps(content).encode()
        else:
            written = draw(broken_json(content, STRANGE))
        lines = b"".join(draw(broken_json(line)) + b"\n" for line in metrics) if what == "metrics" else b""
        return written, model, text, lines

    def check(case: tuple[bytes, bytes, bytes, bytes]) -> None:
        for file, content in zip((*list(files.values())[:2], folder.recipe, folder.metrics), case, strict=True):
            file.write_bytes(content)
        tally.case(lambda: (load_detector(folder, CPU), read_metrics(folder.metrics)), path.name, "recipe", "metrics")

    tally.fuzz(cases(), number, check)


TENSORS = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4)}
_NAMES = [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("subprocess", "Popen"), ("numpy", "array")]


@st.composite
def broken_pickle(draw: st.DrawFn, content: bytes) -> bytes:
    """A pickle whose instructions are exchanged, doubled, left out, and some of which name a function to call."""
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    parts = [content[start:end] for start, end in itertools.pairwise(places)]
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(parts) - 1))
        kind = draw(st.sampled_from(("drop", "double", "swap", "call", "number", "byte")))
        if kind == "drop" and len(parts) > 1:
            del parts[index]
        elif kind == "double":
            parts[index:index] = [parts[index]] * draw(st.sampled_from((1, 1000)))
        elif kind == "swap":
            other = draw(st.integers(0, len(parts) - 1))
            parts[index], parts[other] = parts[other], parts[index]
        elif kind == "call":
            module, name = draw(st.sampled_from(_NAMES))
            parts.insert(index, f"c{module}\n{name}\n(S'touch called'\ntR".encode())
        elif kind == "number":
            parts.insert(index, b"\x8a\x08" + struct.pack("<q", draw(st.sampled_from((0, -1, 2**31, 2**40, 2**62)))))
        else:
            parts[index] = draw(broken_bytes(parts[index]))
    return b"".join(parts)


@st.composite
def broken_archive(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of torch.save with a broken pickle, entries that climb out, are compressed, doubled or left out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as written:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = draw(broken_pickle(data))
            kind = draw(st.integers(0, 19))
            if kind == 0:
                continue
            name = draw(st.sampled_from(("../../../tmp/called", "/tmp/called", "x"))) if kind == 1 else entry.filename
            how = zipfile.ZIP_DEFLATED if kind == 2 else zipfile.ZIP_STORED
            written.writestr(zipfile.ZipInfo(name), b"\0" * (1 << 22) if kind == 2 else data, how)
            if kind == 3:
                data = draw(broken_bytes(data))
                written.writestr(zipfile.ZipInfo(entry.filename + "2"), data)
    return draw(broken_bytes(out.getvalue())) if draw(st.integers(0, 2)) == 0 else out.getvalue()


def _saved(**how: Any) -> bytes:
    out = io.BytesIO()
    torch.save(TENSORS, out, **how)
    return out.getvalue()


@NUMBER
@pytest.mark.filterwarnings("ignore")  # torch's words about formats of its past
@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_weights(tmp_path: Path, number: int, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"weights.{suffix}"
    arrays = {name: tensor.numpy() for name, tensor in TENSORS.items()}
    cases: st.SearchStrategy[bytes] = broken_safetensors(save(TENSORS))
    if suffix == "pkl":
        cases = st.one_of([broken_pickle(pickle.dumps(arrays, protocol)) for protocol in (0, 2, 4)])
    elif suffix == "pth":
        old = _saved(_use_new_zipfile_serialization=False)
        cases = broken_archive(_saved()) | broken_bytes(old) | broken_pickle(pickle.dumps(arrays, 2))
    tally = Tally(f"weights, .{suffix}")

    def check(content: bytes) -> None:
        file.write_bytes(content)
        tally.case(lambda: read_tensors(file, "backbone.weights"), file.name)
        assert {path.name for path in tmp_path.iterdir()} == {file.name}, "something was called"

    tally.fuzz(cases, number, check)
