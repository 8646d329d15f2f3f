"""Versions of the packages MegDet needs, and whether they fit each other; loads torch only to see that it loads."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator

from megdet.studies.doctor.finding import Finding

LEAST_PYTHON, LEAST_TORCH, LEAST_TORCHVISION = (3, 11), (2, 11), (0, 26)
_INSTALL = "uv pip install torch torchvision (uv finds two builds that fit; plain pip may not)"


def look_at_versions() -> Iterator[Finding]:
    """Python, torch, torchvision, timm and megdet."""
    python = platform.python_version()
    if sys.version_info[:2] < LEAST_PYTHON:
        yield Finding("python", "bad", python, f"install Python {_dotted(LEAST_PYTHON)} or newer")
    else:
        yield Finding("python", "good", python)
    found = {name: _version(name) for name in ("megdet", "torch", "torchvision", "timm")}
    missing = [name for name, version in found.items() if not version]
    text = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    if missing:
        yield Finding("versions", "bad", text, f"uv pip install {' '.join(missing)}", dict(found))
        return
    fault, step = version_fault(found["torch"], found["torchvision"], _wanted_torch())
    if not fault:
        fault, step = _loading_fault()
    yield Finding("versions", "bad" if fault else "good", f"{text}{f'; {fault}' if fault else ''}", step, dict(found))


def version_fault(torch: str, torchvision: str, wanted: str = "") -> tuple[str, str]:
    """What is wrong with two versions, and what to do; both empty if nothing is known to be wrong.

    `wanted` is the torch that this torchvision asks for, such as ==2.11.0.
    """
    own, beside = _numbers(torch), _numbers(torchvision)
    if own < LEAST_TORCH:
        return f"megdet needs torch {_dotted(LEAST_TORCH)} or newer", _INSTALL
    if beside < LEAST_TORCHVISION:
        return f"megdet needs torchvision {_dotted(LEAST_TORCHVISION)} or newer", _INSTALL
    for sign, version in re.findall(r"([=>]=)([0-9.]+)", wanted):
        if own < _numbers(version) or (sign == "==" and own > _numbers(version)):
            return f"torchvision {torchvision} asks for torch {sign}{version}", _INSTALL
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if all(builds) and builds[0] != builds[1]:
        return f"two builds, {builds[0]} and {builds[1]}", _INSTALL
    return "", ""


def _wanted_torch() -> str:
    """The versions of torch that the installed torchvision asks for, such as ==2.11.0 or >=2.14.0."""
    asked = (
        re.fullmatch(r"torch *\(?([=><0-9.,]+)\)?", own) for own in importlib.metadata.requires("torchvision") or ()
    )
    return next((found[1] for found in asked if found), "")


def _loading_fault() -> tuple[str, str]:
    try:
        import torchvision
    except Exception as error:  # a library that does not load may raise anything
        return f"torchvision cannot be loaded: {type(error).__name__}: {error}", _INSTALL
    return ("", "") if torchvision.extension._has_ops() else ("torchvision has no operators of its own", _INSTALL)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
