"""The verb export."""

from importlib.util import find_spec

from rich.table import Table

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.errors import InputError
from megdet.export.calibration import Calibration
from megdet.export.exporting import Exported, export_run
from megdet.run_folder.run_path import run_of

_ADVICE = " Another --calibration, or more --calibration-images, may do better."


def run_export(arguments: Arguments) -> None:
    """Export a run and print the proof; the exit code is 1 where it does not hold."""
    calibration = _calibration(arguments)
    if arguments.to == "onnx":
        _need_packages()
    with PROGRESS.status("exporting") as status:
        folder, step = run_of(arguments.run)
        exported = export_run(
            folder,
            arguments.to,
            arguments.out,
            step=step,
            int8=calibration,
            overrides=arguments.overrides,
            images=arguments.images,
            workers=arguments.workers,
            progress=lambda done, of: status.update(f"proof: {done} of {of} images"),
        )
    _print(exported)
    if exported.proof.warning:
        CONSOLE.print(exported.proof.warning)
    files = {"file": str(exported.file), "proof": f"{exported.file}.proof.json", "card": f"{exported.file}.md"}
    arguments.print_json({**files, "passes": exported.holds})
    if not exported.holds:
        CONSOLE.print(
            f"The proof does not hold: an AP differs by {100 * exported.proof.worst:.2f} points, and may by "
            f"{100 * exported.proof.allowed:g}. Do not use the file.{_ADVICE if calibration else ''}"
        )
        raise SystemExit(1)


def _calibration(arguments: Arguments) -> Calibration | None:
    """What --int8 and its options ask for. Raises InputError for its options alone."""
    asked = {"method": arguments.calibration, "images": arguments.calibration_images}
    given = {name: value for name, value in asked.items() if value is not None}
    if given and not arguments.int8:
        raise InputError("--calibration and --calibration-images are for --int8: add it, or leave them out")
    return Calibration(**given) if arguments.int8 else None


def _print(exported: Exported) -> None:
    heading, *rows = exported.proof.rows()
    proof = exported.proof
    images = f"{proof.images} of {proof.of_images}" if proof.images < proof.of_images else f"{proof.images}"
    table = Table(title=f"{exported.file.name} beside the detector, {images} validation images", title_justify="left")
    for name in heading:
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)
    own = proof.int8
    if own is not None:
        for name, cost in (("float32", own.before), ("int8", own.after)):
            CONSOLE.print(f"{name:<7} {cost.bytes / 1e6:7.1f} MB {1e3 * cost.seconds:7.1f} ms an image alone")
    CONSOLE.print(f"file   {exported.file}\nproof  {exported.file}.proof.json\ncard   {exported.file}.md")


def _need_packages() -> None:
    """Raise InputError where the packages of ONNX are missing, before any work."""
    missing = next((name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None), None)
    if missing is not None:
        raise InputError(f"{missing} is not installed: pip install 'megdet[export]'")
