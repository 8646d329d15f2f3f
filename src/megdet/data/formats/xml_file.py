"""Reads XML as annotation tools write it, in any encoding; the files are not trusted."""

import codecs
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from megdet.errors import InputError
from megdet.files import read_bytes

_XML_ENCODING = re.compile(rb"""\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{1,40})["']""")
_ENCODINGS = re.compile("ascii|utf|iso|cp|gb|hz$|big5|shift_jis|euc_|koi8|johab|mac_|tis")
"""Python's names of the encodings that are accepted; some others are very slow."""
_LARGEST = 8 << 20
"""Largest file in bytes: about 30,000 objects; a byte can become 40 in memory."""
_DECLARATIONS = re.compile("<!(ENTITY|ATTLIST)")
"""Declarations by which a few bytes can become gigabytes."""


def parse_xml(path: Path, largest: int = _LARGEST) -> ElementTree.Element:
    """The root of an XML file of at most `largest` bytes.

    Raises InputError if it cannot be read or declares entities or default attributes.
    """
    try:
        return ElementTree.fromstring(_text(path, largest))
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: not valid XML: {error}") from error


def _text(path: Path, largest: int) -> str:
    """The text, decoded by the encoding that the file names: expat knows no Chinese or Japanese encodings."""
    content = read_bytes(path, largest)
    declared = _XML_ENCODING.match(content.removeprefix(codecs.BOM_UTF8))
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = declared[1].decode("ascii") if declared else "utf-16" if is_wide else "utf-8"
    try:
        name = codecs.lookup(encoding).name
        if not _ENCODINGS.match(name):
            raise LookupError
        text = content.removeprefix(codecs.BOM_UTF8).decode(name)
    except LookupError:
        raise InputError(f"{path}: its encoding {encoding!r} is not known; save it as UTF-8") from None
    except UnicodeError as error:
        said = f"it names the encoding {encoding}" if declared else "it names no encoding and is not UTF-8"
        raise InputError(f"{path}: {said}, but cannot be read so ({error}); save it as UTF-8") from None
    if found := _DECLARATIONS.search(text):
        what = "entities" if found[1] == "ENTITY" else "attributes with defaults"
        raise InputError(f"{path}: it defines {what}, which no annotation needs; write them out")
    return text
