"""COCO's files, ground truth and detections: whatever stands in them, each reader gives a result or one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from broken import STRANGE, broken_json
from data_factories import two_images, with_masks, write_set
from fuzzing import Tally, run_verb
from megdet.data.coco import load_coco
from megdet.data.image_info import read_image_info
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.inference.ensemble import check_members, member_weights, merged_members, read_member
from megdet.inference.submission import check_submission

_RUNS = st.text(st.characters(min_codepoint=46, max_codepoint=112), max_size=30)
_SIZE = st.lists(st.sampled_from((0, 1, 30, 40, 65536, 2**31 - 1, 2**31)), min_size=1, max_size=3)
_EDGE = st.sampled_from((0, 1, 15.5, 30, 40, 80, -40, 65536, 1e7, 2e9, 1e29))
_MASKS = st.one_of(
    st.lists(st.lists(_EDGE, max_size=9), max_size=3),
    st.tuples(_EDGE, _EDGE, st.integers(3, 400)).map(lambda own: [[0, 0, own[0], own[1]] * own[2]]),
    st.fixed_dictionaries({"size": _SIZE, "counts": _RUNS}),
    st.fixed_dictionaries(
        {"size": _SIZE, "counts": st.lists(st.sampled_from((0, 1, 30, 1200, 2**31, -1)), max_size=9)}
    ),
    st.sampled_from((65536, 2**31 - 1)).map(lambda edge: {"size": [edge, 1], "counts": [edge]}),
)
FOUND = [
    {"image_id": 3, "category_id": 9, "bbox": [1, 2, 10.5, 20], "score": 0.5},
    {"image_id": 3, "category_id": 9, "bbox": [1, 2, 11.5, 20], "score": 0.4},
    {"image_id": 7, "category_id": 4, "bbox": [5, 5, 8, 8], "score": 0.25},
]
MASKED = [{**own, "segmentation": {"size": [30, 40], "counts": [33, 20, 1147]}} for own in FOUND]


def document() -> dict[str, Any]:
    return {"info": {"year": 2026}, "licenses": [{"id": 1, "name": ""}], **with_masks(two_images())}


@pytest.mark.parametrize("number", [60, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"])
def test_annotations_are_read_or_refused(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, images = write_set(tmp_path, document())
    found = tmp_path / "found.json"
    found.write_text(json.dumps(MASKED))
    tallies = [Tally(f"COCO JSON, {what}") for what in ("training", "check", "evaluation", "images")]

    def check(content: bytes) -> None:
        file.write_bytes(content)
        training, listing, evaluation, info = tallies
        refusal = training.case(lambda: load_coco(file, images, keep_empty=True, with_masks=True), file.name, "images")
        problems = listing.case(lambda: run_verb("data", "check", file, images, "--masks"), file.name)
        assert problems or not refusal, refusal  # the check with --masks also refuses an object without one
        evaluation.case(lambda: evaluate_files(file, found), file.name, found.name)
        info.case(lambda: read_image_info(file), file.name)

    cases = broken_json(document(), STRANGE | _MASKS)
    tallies[0].fuzz(cases, number, check)
    print("\n".join(map(str, tallies[1:])))


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("rows", [FOUND, MASKED], ids=["boxes", "masks"])
def test_detections_are_read_or_refused(tmp_path: Path, number: int, rows: list[dict[str, Any]]) -> None:
    truth, file, sound = tmp_path / "truth.json", tmp_path / "found.json", tmp_path / "sound.json"
    truth.write_text(json.dumps(document()))
    sound.write_text(json.dumps(rows))
    info, kind = read_image_info(truth), "segm" if rows is MASKED else "bbox"
    tallies = [Tally(f"detections ({kind}), {what}") for what in ("evaluation", "ensemble", "submission")]

    def merge() -> None:
        members = [read_member(file), read_member(sound)]
        check_members(members, info)
        ids = list(info.classes)
        for method in ("wbf", "vote", "soft-nms"):
            merged_members(members, ids, member_weights(2, ids, None), method)

    def check(content: bytes) -> None:
        file.write_bytes(content)
        tallies[0].case(lambda: evaluate_files(truth, file), file.name)
        tallies[1].case(merge, file.name, sound.name)
        tallies[2].case(lambda: check_submission(read_member(file).rows, info, kind, file.name), file.name)

    tallies[0].fuzz(broken_json(rows, STRANGE | _MASKS), number, check)
    print("\n".join(map(str, tallies[1:])))
