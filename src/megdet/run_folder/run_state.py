"""The state of a checkpoint besides its tensors."""

from typing import Annotated, Any

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The state of a run without its tensors; written to `state.json`, read strictly."""

    step: Count
    """optimizer steps done"""
    class_names: tuple[str, ...]
    """class names, by label"""
    category_ids: tuple[int, ...]
    """category ids in the data set's file, by label"""
    num_images: Count
    """images of the training data; 0 for weights that were trained elsewhere"""
    data: str = ""
    """fingerprint of the training data; empty for weights that were trained elsewhere"""
    val_data: str = ""
    """fingerprint of the validation data; empty if unknown"""
    evaluation: dict[str, Any] | None = None
    """the numbers of the last evaluation"""
    evaluated_step: int = -1
    """the step after which that evaluation was made, -1 for none"""
    best_score: float | None = None
    """the highest mmAP of boxes of all evaluations so far"""
    best_step: int = -1
    """the step of that evaluation, the earliest among equals; -1 for none"""

    roll_backs: Count = 0
    """roll-backs so far: how often the run went back to a checkpoint"""
    rolled_back_to: int = -1
    """the step of the checkpoint of the last roll-back, -1 for none"""

    def __post_init__(self) -> None:
        if len(self.class_names) != len(self.category_ids):
            raise ValueError(f"{len(self.class_names)} class names and {len(self.category_ids)} category ids")
