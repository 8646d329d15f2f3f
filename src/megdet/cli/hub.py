"""The verbs hub push and hub pull."""

from pathlib import Path

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.export.hub import pull, push
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_path import run_of


def run_push(arguments: Arguments) -> None:
    """Publish a run and print its address."""
    folder, step = run_of(arguments.run)
    with PROGRESS.status("sending"):
        address = push(folder, arguments.name, step=step, is_private=arguments.private, revision=arguments.revision)
    CONSOLE.print(f"published  {address}")
    arguments.print_json({"address": address})


def run_pull(arguments: Arguments) -> None:
    """Make a run folder from a repository and print its path."""
    folder = RunFolder(arguments.run or Path("runs") / arguments.name.split("/")[-1])
    with PROGRESS.status("fetching"):
        config = pull(arguments.name, folder, revision=arguments.revision)
    CONSOLE.print(f"{folder.path}: {len(config.class_names)} classes; try `megdet detect {folder.path} IMAGE`")
    arguments.print_json({"run": str(folder.path), "classes": len(config.class_names), "step": config.step})
