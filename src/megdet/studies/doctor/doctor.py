"""All findings about this machine, in the order of the layers: software, devices, system, data."""

import os
from collections.abc import Iterator
from pathlib import Path

from megdet.data.far.folder import ImageFolder
from megdet.studies.doctor.finding import Finding
from megdet.studies.doctor.limits import (
    core_quota,
    look_at_cores,
    look_at_disk,
    look_at_open_files,
    look_at_shared_memory,
    look_at_threads,
)
from megdet.studies.doctor.versions import look_at_versions


def look_at_machine(run: Path, annotations: Path | None = None, images: ImageFolder | None = None) -> Iterator[Finding]:
    """Each finding as soon as it is known.

    Args:
        run: the run folder whose disk is looked at; it need not exist.
        annotations: COCO instances of the images to load; without them some are drawn.
        images: the folder of these images.

    Raises:
        InputError: the data cannot be read.
    """
    versions = list(look_at_versions())
    yield from versions
    loads = all(finding.state != "bad" for finding in versions)
    if loads:
        from megdet.studies.doctor.devices import look_at_devices  # here: torch may be missing, which was reported

        yield from look_at_devices()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield look_at_cores(os.cpu_count() or 1, affinity, core_quota(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    yield look_at_threads(affinity)
    yield look_at_open_files()
    yield look_at_shared_memory()
    yield from look_at_disk(run)
    if loads:
        from megdet.studies.doctor.loading import look_at_loading

        yield look_at_loading(annotations, images)
