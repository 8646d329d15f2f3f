"""What an exported file says of itself, so that it needs nothing else."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated

import msgspec

from megdet.errors import InputError
from megdet.files import parse_json
from megdet.recipe import Recipe
from megdet.recipe_file import parse_recipe

FORMAT = 1
KEY = "megdet"
"""Under which name it stands in the metadata of a file."""
SUFFIXES = {".onnx": "onnx", ".pt2": "torch-export"}
"""The kinds of exported files, by the end of their names."""


class Description(msgspec.Struct, forbid_unknown_fields=True, dict=True):
    """The part of a detector that is no graph."""

    format: int
    megdet: str
    """the version that wrote it"""
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    has_masks: bool
    exact_paste: bool
    """whether its masks go into an image where their boxes are, not where these are in whole pixels"""
    recipe: str
    """the complete recipe of the run, as YAML"""
    step: int
    """of the checkpoint"""
    weights: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the file of its weights"""
    source: str = ""

    @classmethod
    def read(cls, metadata: Mapping[str, str], source: str) -> "Description":
        """The description in the metadata of a file. Raises InputError where there is none, or one of another kind."""
        text = metadata.get(KEY)
        if text is None:
            raise InputError(f"{source}: not a detector that `megdet export` wrote: its metadata have no {KEY}")
        found: Description = parse_json(text.encode(), f"{source}, {KEY}", cls)
        if found.format != FORMAT:
            raise InputError(f"{source}: its format is {found.format}, this MegDet reads {FORMAT}: export it again")
        if len(found.class_names) != len(found.category_ids):
            raise InputError(f"{source}, {KEY}: there are not as many class_names as category_ids")
        found.source = source
        return found

    def text(self) -> str:
        """As it stands in the metadata."""
        return msgspec.json.encode(self).decode()

    @cached_property
    def parsed(self) -> Recipe:
        """The recipe. Raises InputError where it is none."""
        return parse_recipe(self.recipe, f"the recipe in {self.source}")
