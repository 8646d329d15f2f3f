"""From a run to a file with its proof and its card; what does not pass is kept under another name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megdet import __version__
from megdet.errors import InputError
from megdet.export.calibration import Calibration, Inputs, training_inputs
from megdet.export.card import model_card
from megdet.export.files import described, write_graph
from megdet.export.proof import MOST_AP, MOST_AP_INT8, Proof, prove
from megdet.export.quantized import Quantized
from megdet.export.refusals import refuse_unexportable
from megdet.exported.description import SUFFIXES
from megdet.files import make_folder, write_json_atomically, write_text_atomically
from megdet.inference.trained import TrainedDetector, load_detector, read_recipe
from megdet.run_folder.checkpoint_files import checkpoint_path, open_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import suffix_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    proof: Proof

    @property
    def holds(self) -> bool:
        """Whether the file does what the detector does."""
        return self.proof.holds


def export_run(
    folder: RunFolder,
    kind: str,
    out: Path | None = None,
    *,
    step: int | None = None,
    int8: Calibration | None = None,
    overrides: dict[str, Any] | None = None,
    images: int | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Exported:
    """Export a checkpoint of a run, prove the file, and write its card.

    Args:
        folder: the run.
        kind: onnx or torch-export.
        out: the file; default `export/` in the run.
        step: of the checkpoint; None = the newest.
        int8: let layers compute with 8-bit integers, whose ranges come from this; only of onnx.
        overrides: keys of the recipe to change.
        images: how many validation images the proof looks at; None = all.
        workers: processes that load images.
        progress: called with the images done and all of them.

    Returns:
        The file. One whose proof does not hold has `.failed` in its name.

    Raises:
        InputError: the run, its data or the place of the file cannot be used, or the detector cannot be exported.
    """
    recipe = read_recipe(folder, overrides)
    refuse_unexportable(recipe)
    file = _place(folder, kind, out, step, is_int8=int8 is not None)
    inputs = training_inputs(recipe, int8.images) if int8 is not None else []
    # in float32, whatever the run computed in, since the file does
    trained = load_detector(folder, torch.device("cpu"), {**(overrides or {}), "precision": "float32"}, step=step)
    description = described(trained, _weights_of(folder, trained.step), __version__)
    make_folder(file.parent)
    unproven, in_float = _beside(file, "unproven"), _beside(file, "float32")
    try:
        if int8 is None:
            write_graph(trained, description, kind, unproven)
            quantized, allowed = None, MOST_AP
        else:
            write_graph(trained, description, kind, in_float)
            quantized, allowed = _in_8_bits(trained, in_float, unproven, inputs, int8), MOST_AP_INT8
        proof = prove(trained, unproven, images=images, workers=workers, allowed=allowed, progress=progress)
        failed = _beside(file, "failed")
        final = file if proof.holds else failed
        unproven.replace(final)
        if proof.holds:  # what an earlier export left
            for path in _files_of(failed):
                path.unlink(missing_ok=True)
    finally:
        unproven.unlink(missing_ok=True)
        in_float.unlink(missing_ok=True)
    proof = replace(proof, file=final.name, int8=quantized)
    _, proof_file, card_file = _files_of(final)
    write_json_atomically(proof_file, proof.as_dict(), indent=2)
    write_text_atomically(card_file, model_card(final.name, description, proof))
    return Exported(final, proof)


def _in_8_bits(
    trained: TrainedDetector, in_float: Path, file: Path, inputs: list[Inputs], calibration: Calibration
) -> Quantized:
    """Write the file of 8-bit integers; the layers that predict stay as they are."""
    from megdet.export.int8 import write_int8  # here, because only it needs onnxruntime's quantisation

    predicting = {*trained.model.class_layers, *trained.model.small_start}
    return write_int8(in_float, file, inputs, calibration.method, predicting)


def _place(folder: RunFolder, kind: str, out: Path | None, step: int | None, *, is_int8: bool) -> Path:
    """The file to write. Raises InputError for a name of another kind."""
    if is_int8 and kind != "onnx":
        raise InputError(f"--int8 is for --to onnx, not {kind}: onnxruntime is what computes with 8-bit integers here")
    suffix = next(own for own, of in SUFFIXES.items() if of == kind)
    file = out or folder.path / "export" / f"{folder.path.resolve().name}{suffix_of(step)}{'-int8' * is_int8}{suffix}"
    if file.suffix != suffix:
        raise InputError(f"{file}: a file of --to {kind} ends with {suffix}, so that others know what it is")
    return file


def _files_of(file: Path) -> tuple[Path, Path, Path]:
    """An exported file, its proof and its card."""
    return file, file.with_name(f"{file.name}.proof.json"), file.with_name(f"{file.name}.md")


def _beside(file: Path, what: str) -> Path:
    return file.with_name(f"{file.stem}.{what}{file.suffix}")


def _weights_of(folder: RunFolder, step: int) -> str:
    """SHA-256 of the file of a step's weights: the averaged ones where the run keeps some."""
    checkpoint = open_checkpoint(checkpoint_path(folder, step))
    file = checkpoint.file("averages" if "averages" in checkpoint.hashes else "model")
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
