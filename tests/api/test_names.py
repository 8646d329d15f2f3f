"""`import megdet`: quick, and what it offers is typed and documented."""

import inspect
import subprocess
import sys

import pytest

import megdet
from megdet import api


def test_the_import_loads_neither_torch_nor_the_interface_until_a_name_is_used():
    program = (
        "import sys, megdet; before = set(sys.modules); assert not {'torch', 'numpy', 'megdet.api'} & before;"
        "assert set(megdet.__all__) <= set(dir(megdet)); megdet.load; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_detections_need_no_torch():
    program = "import sys, megdet.detections; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_the_package_offers_the_names_of_its_interface():
    assert megdet.__all__ == api.__all__
    for name in megdet.__all__:
        assert getattr(megdet, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = megdet.laod


def public_functions(value):
    """The value, and the methods of a class."""
    if not inspect.isclass(value):
        return [value]
    own = [member for name, member in vars(value).items() if not name.startswith("_") or name == "__init__"]
    functions = [getattr(member, "fget", member) for member in own]
    return [inspect.unwrap(function) for function in functions if callable(function)]


@pytest.mark.parametrize("name", megdet.__all__)
def test_every_public_name_is_documented_and_typed(name):
    value = getattr(megdet, name)
    assert inspect.getdoc(value)
    for function in public_functions(value):
        if not inspect.isfunction(function):
            continue
        assert function.__name__ == "__init__" or inspect.getdoc(function), function
        hints = set(inspect.get_annotations(function)) | set(getattr(function, "__annotations__", {}))
        wanted = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert wanted <= hints, function
        assert function.__name__ == "__init__" or "return" in hints, function
