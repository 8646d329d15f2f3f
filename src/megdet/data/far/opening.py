"""Far files for code that mostly reads local ones: fsspec is imported when the first far one is read."""

from collections.abc import Sequence

from megdet.data.far.folder import FarFile, FarFolder, ImageFile, ImageFolder


def far_content(file: FarFile) -> bytes:
    """Its bytes, from a copy on this machine if there is one. Raises InputError with the reason alone."""
    from megdet.data.far import reading

    return reading.content_of(file)


def forget(file: FarFile) -> None:
    """Delete the copy of a file, since its content is no image: the server may have a sound one now."""
    from megdet.data.far import reading

    reading.forget(file)


def fetch_ahead(files: Sequence[ImageFile]) -> None:
    """Fetch the far ones of the files that are read next, several at once; what fails fails when it is read."""
    far = [file for file in files if isinstance(file, FarFile)]
    if len(far) > 1:
        from megdet.data.far import reading

        reading.fetch_ahead(far)


def notices_of(folder: ImageFolder) -> list[str]:
    """What the user should know of reading a folder in this process, since the last call; of a local one nothing."""
    if not isinstance(folder, FarFolder):
        return []
    from megdet.data.far import reading

    return reading.notices_of(folder)
