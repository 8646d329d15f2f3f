"""Tables in text files (CSV), line by line."""

import csv
import io
from pathlib import Path

from megdet.errors import InputError
from megdet.files import LARGEST_JSON, read_bytes


def csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a table that are not empty, with their numbers, split into fields.

    Commas, semicolons or tabs are between the fields, whichever the first line has most of.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text, or a line of it is not valid.
    """
    try:
        text = read_bytes(path, LARGEST_JSON).decode("utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        return [(reader.line_num, words) for words in reader if any(word.strip() for word in words)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not a valid CSV line: {error}") from None
