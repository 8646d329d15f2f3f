"""What cannot leave the project in a file, by the keys that ask for it."""

from megdet.errors import InputError
from megdet.recipe import Recipe

_MORE_LOOKS = ("test_iterations", "vote_iou")
"""Keys of a second stage, 0 where it looks once."""


def refuse_unexportable(recipe: Recipe) -> None:
    """Raise InputError for a recipe whose detection is more than one look at an image, naming the key."""
    evaluation = recipe.evaluation
    asked = {
        "evaluation.flip false": evaluation.flip,
        "evaluation.scales []": len(evaluation.scales) > 1,
        "evaluation.object_ranges []": bool(evaluation.object_ranges),
    }
    for name, section in vars(recipe.model).items():
        asked |= {f"model.{name}.{key} 0": bool(getattr(section, key, 0)) for key in _MORE_LOOKS}
    for wanted, is_asked in asked.items():
        if is_asked:
            key = wanted.split()[0]
            raise InputError(
                f"{key}: an exported detector looks at an image once, and this key asks for more: export with "
                f"--{wanted}, which changes the scores"
            )
