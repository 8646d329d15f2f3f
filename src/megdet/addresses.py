"""Addresses of folders that are not on this machine's disks, as fsspec writes them: `s3://bucket/photos`.

An address is kept in the run folder and stands in messages, so it must not hold a secret.
"""

import re

_BEGINS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_USER = re.compile(r"(?<=://)[^/\s@]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_WEB = ("http://", "https://")


def is_address(text: str) -> bool:
    """Whether a text is an address; any other is the path of a folder. `file://` counts as one."""
    return "://" in text and _BEGINS.match(text) is not None


def masked(text: str) -> str:
    """A text without what may be secret in the addresses in it: user, password and query."""
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def address_fault(address: str) -> str:
    """Why an address is refused; empty if it is not. It asks no server."""
    if not address.isprintable():
        return "it has control characters in it: write the address again"
    for part in address.split("::"):
        user = _USER.search(part)
        if user and (":" in user[0] or part.startswith(_WEB)):
            return (
                "it holds a user or a password, which would be kept in the run folder: leave them out, and put them "
                'where the server\'s library looks for them ("Images far away" in docs/data.md)'
            )
        if part.startswith(_WEB) and "?" in part:
            return (
                "it has a query (?...), which may be a signed key and would be kept in the run folder: give an address "
                "without one, or fetch the file and give its path"
            )
    return ""
