"""The verb chaos."""

from dataclasses import replace

from megdet.cli.options import CONSOLE, PROGRESS, Arguments
from megdet.contract.chaos.chaos import DEVICES, chaos
from megdet.recipe_file import load_recipe
from megdet.runtime import num_gpus


def run_chaos(arguments: Arguments) -> None:
    """Train undisturbed and disturbed, print the verdict; exit code 1 if a disturbed run ended differently."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.exact:
        recipe = replace(recipe, exact=True)
    findings = chaos(
        recipe,
        **arguments.given("kills", "devices", "seed", "timeout"),
        options=_options(arguments),
        progress=PROGRESS.print,
    )
    if arguments.json:
        arguments.print_json(findings.as_dict())
    else:
        CONSOLE.print(", ".join(f"{count} {word}" for word, count in findings.counts()))
        CONSOLE.print(findings.sentence())
    if not findings.passes:
        raise SystemExit(1)


def _options(arguments: Arguments) -> list[str]:
    """The options about this machine that every start of `megdet train` gets."""
    most = max(arguments.devices or DEVICES)
    words = ["--device", arguments.device or ("cuda" if num_gpus() >= most else "cpu")]
    if arguments.workers is not None:
        words += ["--workers", str(arguments.workers)]
    if arguments.evaluate_in_background:
        words += ["--evaluate-in-background"]
    if arguments.evaluate_on:
        words += ["--evaluate-on", arguments.evaluate_on]
    return words + (["--compile"] if arguments.compile else [])
