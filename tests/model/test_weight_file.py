"""Files of weights that anybody may have made."""

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megdet.errors import InputError
from megdet.model.weight_file import misfit, read_tensors


def test_plain_tensors_are_read_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.tensor(3),
        "c": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    torch.save({"state_dict": tensors}, tmp_path / "a.pth")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        found = read_tensors(tmp_path / name, "weights")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_checkpoint_of_torchvisions_reference_script_is_read(tmp_path: Path) -> None:
    options = argparse.Namespace(data_path="coco", lr=0.02)
    torch.save(
        {"model": {"a": torch.ones(2)}, "optimizer": {"state": {}}, "args": options, "epoch": 3}, tmp_path / "a.pth"
    )
    assert read_tensors(tmp_path / "a.pth", "weights")["a"].tolist() == [1, 1]


def quantized() -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # torch means to drop them
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (torch.eye(3).to_sparse(), "not a dense tensor"),
        (quantized(), "not a dense tensor"),
        (torch.ones(3, device="meta"), "not a dense tensor"),
        (torch.ones(3, dtype=torch.complex64), "its numbers are torch.complex64"),
        (torch.ones(1, 1024).expand(10**6, 1024), r"its shape \(1000000, 1024\) is larger than its stored data"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
    ],
)
def test_tensors_that_are_not_plain_are_refused_by_name(tmp_path: Path, tensor: Tensor, fault: str) -> None:
    torch.save({"layer.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=rf"weights .*a\.pth: tensor 'layer\.weight' cannot be used: .*{fault}"):
        read_tensors(tmp_path / "a.pth", "weights")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"a": {"b": torch.ones(1)}}, torch.ones(2), None])
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match="not hold a plain dictionary of tensors"):
        read_tensors(tmp_path / "a.pth", "weights")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    torch.save({3: torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="tensor 3 cannot be used: its name is not a string"):
        read_tensors(tmp_path / "a.pth", "weights")


def test_a_small_archive_of_much_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "a.pth", "w") as packed:
        for entry in plain.namelist():
            packed.writestr(entry, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 1 << 14
    with pytest.raises(InputError, match="neither a safetensors file nor tensors"):
        read_tensors(tmp_path / "a.pth", "weights")


class Runs:
    def __reduce__(self) -> object:
        return (exec, ("raise SystemExit('code of the file was run')",))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Runs()}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="neither a safetensors file nor tensors"):
        read_tensors(tmp_path / "a.pth", "weights")


def test_a_tensor_of_another_shape_or_kind_does_not_fit() -> None:
    wanted = torch.ones(2, 3)
    assert misfit("a", torch.ones(2, 3, dtype=torch.float16), wanted) == ""
    assert "has shape (3, 2), not (2, 3)" in misfit("a", torch.ones(3, 2), wanted)
    assert "holds torch.int64, not torch.float32" in misfit("a", torch.ones(2, 3, dtype=torch.int64), wanted)


def test_arrays_of_a_pickle_are_tensors_in_this_machines_order_of_bytes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=">f4").reshape(2, 3), "b": np.asfortranarray(np.ones((2, 3)))}
    for content in (arrays, {"model": arrays, "__author__": "somebody"}):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        found = read_tensors(tmp_path / "a.pkl", "weights")
        assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["b"].dtype == torch.float64
        assert found["b"].is_contiguous()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"cposix\nsystem\n(S'echo'\ntR.", "cannot be used: it asks for posix.system"),
        (pickle.dumps({"a": np.ones(2), "b": "text"}), "does not hold a plain dictionary of tensors"),
        (pickle.dumps({"a": np.array([np.nan])}), "not finite"),
        (pickle.dumps({3: np.ones(2)}), "its name is not a string"),
        (pickle.dumps([1]), "cannot be used: it holds no dictionary"),
        (pickle.dumps({"a": np.ones(2)})[:-9], "cannot be used: it is not a complete pickle"),
    ],
)
def test_a_pickle_of_more_than_finite_arrays_is_refused_in_one_line(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(InputError, match=rf"weights .*a\.pkl: .*{fault}"):
        read_tensors(tmp_path / "a.pkl", "weights")
