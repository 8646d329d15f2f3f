"""Verbs about the paper's science: analyse variance, analyse sampling, lr-test."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megdet.cli.machine import join_world, num_workers, run_options
from megdet.cli.options import CONSOLE, Arguments
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import make_folder, write_json_atomically
from megdet.recipe_file import load_recipe, recipe_name
from megdet.run_folder.folder import RunFolder, encode_non_finite
from megdet.studies.gradients.findings import Variance
from megdet.studies.gradients.pictures import plot_updates, plot_variance
from megdet.studies.gradients.units import Study, load_study
from megdet.studies.gradients.variance import measure_variance
from megdet.studies.rates.picture import plot_rate_test
from megdet.studies.rates.trial import RateTest, run_rate_test
from megdet.studies.sampling.pictures import draw_proposals, most_and_least_balanced, sampled_images
from megdet.studies.sampling.ratios import Ratio, sampling_table
from megdet.terminal import Terminal

_SHOWN = 8


def run_variance(arguments: Arguments) -> None:
    """Measure the variance of the gradient, print the tables and draw the figures."""
    if arguments.batch == 0 or arguments.images == 0:
        raise InputError("--batch and --images: they must be at least 1")
    if arguments.overrides and arguments.out is None:
        changed = ", ".join(f"--{key}" for key in arguments.overrides)
        raise InputError(
            f"{changed}: the measured recipe is not the run's own; name a folder for its results with --out"
        )
    world = _join_alone(arguments, "analyse variance")
    folder = RunFolder(arguments.run)
    study = load_study(folder, world.device, arguments.overrides, arguments.step)
    out = make_folder(arguments.out or folder.path / "analysis" / "variance")
    with _status() as status:
        found = measure_variance(
            study,
            batch=arguments.batch,
            **arguments.given("factors"),
            images=arguments.images,
            rate=arguments.rate,
            workers=num_workers(arguments),
            progress=_progress(status),
        )
    pictures = [out / "variance.png", out / "updates.png"]
    plot_variance(found, pictures[0])
    plot_updates(found, pictures[1])
    shown = (_levels_table(found), _updates_table(found), _noise_table(found), found.rates, found.remark)
    _hand_over(arguments, found.as_dict(), out / "variance.json", pictures, shown)


def run_sampling(arguments: Arguments) -> None:
    """Print Table 1 of the runs and draw Figure 2 for each."""
    world = _join_alone(arguments, "analyse sampling")
    folders = [RunFolder(run) for run in arguments.runs]
    if len({folder.path.resolve() for folder in folders}) < len(folders):
        raise InputError("analyse sampling: a run is named twice")
    rows = sampling_table(folders, arguments.epochs)
    out = make_folder(arguments.out or folders[0].path / "analysis" / "sampling")
    pictures, images = [], {}
    for number, folder in enumerate(folders, 1):
        study = load_study(folder, world.device)
        count = arguments.images if arguments.images is not None else study.recipe.batch_size
        found = sampled_images(study, count, num_workers(arguments))
        name = "proposals.png" if arguments.out is None or len(folders) == 1 else f"proposals-{number}.png"
        pictures.append((arguments.out or folder.path / "analysis" / "sampling") / name)
        draw_proposals(most_and_least_balanced(found, _SHOWN), _proposals_title(study), pictures[-1])
        images[str(folder.path)] = [{"image": own.file_name, "ratio": own.ratio} for own in found]
    content = {"rows": [row.as_dict() for row in rows], "images": images}
    _hand_over(arguments, content, out / "sampling.json", pictures, (_sampling_table(rows),))


def run_lr_test(arguments: Arguments) -> None:
    """Run the range test and the stability runs, print the recommendation and draw their curves."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    world = join_world(arguments)
    name = recipe_name(arguments.recipe)
    out = arguments.out or Path("runs") / "lr-test" / name
    world.on_first(lambda: make_folder(out))
    with _status(is_first=world.is_first) as status:
        found = run_rate_test(
            recipe,
            world,
            run_options(arguments),
            lowest=arguments.lowest,
            highest=arguments.highest,
            steps=arguments.steps,
            rates=arguments.rates,
            warmups=arguments.warmup,
            **arguments.given("after"),
            progress=_progress(status),
        )
    if not world.is_first:
        return
    plot_rate_test(found, f"{name}: {found.batch_size} images a step", out / "lr-test.png")
    content = {"recipe": name, **found.as_dict()}
    _hand_over(arguments, content, out / "lr-test.json", [out / "lr-test.png"], (_rates_table(found), found.sentence()))


def _join_alone(arguments: Arguments, verb: str) -> World:
    world = join_world(arguments)
    if world.size > 1:
        raise InputError(f"{verb} runs in one process, not in {world.size}: start it without torchrun")
    return world


def _levels_table(found: Variance) -> Table:
    title = (
        f"variance of the gradient after {found.step} steps, {found.images} images, errors from {found.blocks} blocks"
    )
    table = Table("module", "images", "mini-batches", "variance", "over the 1/N law", title=title + found.changes)
    for module in found.modules:
        for level in module.levels:
            law = "1" if level.factor == 1 else str(level.of_law)
            cells = (str(level.batch), str(level.batches), str(level.variance), law)
            table.add_row(module.title if level.factor == 1 else "", *cells)
    return table


def _updates_table(found: Variance) -> Table:
    title = f"k updates of rate {found.rate:.4g} beside one of k times the rate{found.changes}"
    table = Table("module", "k", "variance of small", "of large", "large / small", "apart", title=title)
    for module in found.modules:
        for place, update in enumerate(module.updates):
            cells = (str(update.factor), str(update.small), str(update.large), str(update.ratio))
            table.add_row(module.title if place == 0 else "", *cells, f"{update.distance:.1%}")
    return table


def _noise_table(found: Variance) -> Table:
    table = Table(
        *("module", "two batch sizes", "units"),
        title=f"gradient noise scale in images (McCandlish et al., 2018){found.changes}",
    )
    for module in found.modules:
        cells = []
        for noise in (module.two_batches, module.direct):
            least = noise.inverse.value + 2 * noise.inverse.error
            unresolved = f"above {1 / least:.3g}" if least > 0 else "not known"
            cells.append(str(noise.scale) if noise.is_resolved else f"{unresolved}: too few images")
        table.add_row(module.title, *cells)
    return table


def _sampling_table(rows: list[Ratio]) -> Table:
    title = "positive among the sampled (Table 1)"
    samples = [f"{sample}s (%)" for sample in rows[0].ratios]
    table = Table("epoch", "batch size", "BN size", *samples, f"paper, {samples[0]}", "run", title=title)
    for row in rows:
        paper = "" if row.paper is None else f"{100 * row.paper:.2f}"
        ratios = (*(f"{100 * ratio:.2f}" for ratio in row.ratios.values()), paper)
        lost = "" if row.steps == row.epoch_steps else f" ({row.steps} of {row.epoch_steps} steps)"
        table.add_row(f"{row.epoch}{lost}", str(row.batch_size), str(row.bn_size), *ratios, row.run)
    return table


def _rates_table(found: RateTest) -> Table:
    table = Table("rate", "optimizer.base_lr", "warmup", "", "last loss", title="stability")
    for run in found.stability:
        end = "survives" if run.survives else f"diverges at step {run.course.diverged}"
        last = f"{run.last_loss:.3g}"
        table.add_row(f"{run.rate:.4g}", f"{run.base_lr:.4g}", str(run.warmup_steps), end, last)
    return table


def _proposals_title(study: Study) -> str:
    return f"{study.folder.path.name}: sampled proposals after {study.step} steps"


def _status(*, is_first: bool = True) -> Any:
    return Terminal(stderr=True, quiet=not is_first).status("")


def _progress(status: Any) -> Callable[[str, int, int], None]:
    return lambda what, done, number: status.update(f"{what}: {done} of {number}")


def _hand_over(
    arguments: Arguments, content: dict[str, Any], numbers: Path, pictures: list[Path], shown: Sequence[Table | str]
) -> None:
    """Write the numbers; print them as JSON, or print `shown` and the paths of the files."""
    content = encode_non_finite(content)
    write_json_atomically(numbers, content, indent=2)
    if arguments.json:
        arguments.print_json(content)
        return
    for own in shown:
        CONSOLE.print(own)
    CONSOLE.print(f"numbers  {numbers}")
    for picture in pictures:
        CONSOLE.print(f"picture  {picture}")
