"""What a recipe is refused with, for tests."""

import pytest

from megdet.errors import InputError
from megdet.recipe_file import parse_recipe


def refusal(text: str, **overrides: object) -> str:
    """The message with which a recipe is refused; overrides write a dot as two underscores."""
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "r.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    message = str(caught.value)
    assert "\n" not in message
    return message
