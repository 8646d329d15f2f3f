"""The winning entry (appendix, Table 4): its parts in the appendix's order, each a row on top of the rows before.

The paper names the parts and gives the result of all together, not of single parts. Not in the paper: how each part was
built and its strength; our choices are the keys below. RoIAlign, which the appendix lists too, is in every row, as in
the rows of Tables 2 and 3. A row is trained with several seeds, each in its own run folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe

RECIPE = "reproduce-demo-entry"
"""The packaged recipe of the baseline."""


@dataclass(frozen=True)
class Part:
    """A part of the entry."""

    name: str
    """name of its row"""
    appendix: str
    """its name in the appendix, with the paper's references"""
    changes: Mapping[str, Any]
    """recipe keys that turn it on"""


PARTS = (
    Part("baseline", "the detector of Sec. 4, with ROIAlign [14]", {}),
    Part("ohem", "OHEM [35]", {"model.box_head.sampling": "hard", "model.box_head.hard_nms_iou": 0.7}),
    Part("atrous", "atrous convolution [40, 2]", {"model.backbone.output_stride": 16}),
    Part("base-model", "stronger base models [38, 18]", {"model.backbone.name": "seresnet18"}),
    Part("large-kernel", "large kernel [28]", {"model.fpn.large_kernel": 7}),
    Part(
        "segmentation",
        "segmentation supervision [27, 34]",
        {"model.segmentation.enabled": True, "model.segmentation.norm": "batch"},
    ),
    Part(
        "structure",
        "diverse network structure [12, 32, 36]",
        {
            "model.box_head.convolutions": 2,
            "model.box_head.convolution_channels": 64,
            "model.box_head.block": "inception",
            "model.box_head.norm": "batch",
        },
    ),
    Part("context", "contextual modules [22, 9]", {"model.box_head.global_context": True}),
    Part("multi-scale", "multi-scale training", {"data.short_edges": [80, 96, 112], "evaluation.scales": [96]}),
)
"""The trainings of the ablation. Multi-scale testing comes after them: it trains nothing."""

TESTING: Mapping[str, str] = MappingProxyType({"evaluation.scales": "[80, 96, 112, 128]", "evaluation.flip": "true"})
"""The keys of multi-scale testing, for the detector that has all parts."""

MEMBERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "member-noc": {"model.box_head.block": "convolution"},
        "member-cascade": {"model.kind": "cascade_rcnn"},
        "member-resnet": {"model.backbone.name": "resnet26"},
    }
)
"""The other detectors of the ensemble, by name, as changes to the detector with all parts."""


def entry_recipes(changes: Mapping[str, Any], seeds: int) -> dict[str, Recipe]:
    """The recipe of every training by the name of its run folder: all of seed 0 first, then all of seed 1.

    Args:
        changes: keys on top of the packaged recipe's, such as the files of the data.
        seeds: number of seeds.
    """
    recipes = {}
    for seed in range(seeds):
        keys: dict[str, Any] = {**changes, "seed": seed}
        for part in PARTS:
            keys |= part.changes
            recipes[run_name(part.name, seed)] = load_recipe(RECIPE, keys)
        for name, own in MEMBERS.items():
            recipes[run_name(name, seed)] = load_recipe(RECIPE, {**keys, **own})
    return recipes


def member_names(seed: int) -> list[str]:
    """The run folders of the ensemble: the detector that has all parts first."""
    return [run_name(name, seed) for name in (PARTS[-1].name, *MEMBERS)]


def run_name(row: str, seed: int) -> str:
    """The run folder of a row and seed, in the folder of all rows: `entry-ohem-s0`."""
    return f"entry-{row}-s{seed}"
