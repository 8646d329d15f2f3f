"""The screen of a run: its standing as lines of text and two bars, for any width."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megdet.screen.standing import Score, Standing, duration

_WIDEST, _WIDEST_BAR = 100, 60
_NARROWEST_BAR, _PERCENTAGE = 8, 4
_GAP = "   "


def draw(standing: Standing, width: int, note: str = "") -> RenderableType:
    """The screen at a width in columns; `note` is a line on what goes on besides steps, such as an evaluation."""
    width = min(width, _WIDEST)
    return Constrain(Group(_heading(standing), _bars(standing, width), _numbers(standing, width, note)), width)


def _heading(standing: Standing) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    grid.add_column(justify="right", overflow="ellipsis", no_wrap=True)
    grid.add_row(Text(standing.name, style="bold"), Text(standing.place, style="dim"))
    return grid


def _bars(standing: Standing, width: int) -> RenderableType:
    number, done, steps = standing.epoch
    left = standing.seconds_left
    ends = "" if left is None or standing.step == standing.last_step else duration(left) + " left"
    rows = [
        (f"epoch {number}/{standing.epochs}", done, steps, f"step {done} of {steps}"),
        ("run", standing.step, standing.last_step, ends or f"step {standing.step} of {standing.last_step}"),
    ]
    # label, bar, percentage and text, with gaps of two columns; a narrow terminal has no room for the text
    labels, texts = max(len(row[0]) for row in rows), max(len(row[3]) for row in rows)
    room = width - labels - _PERCENTAGE - 2 * 2
    has_text = room - texts - 2 >= _NARROWEST_BAR
    bar = max(1, min(_WIDEST_BAR, room - texts - 2 if has_text else room))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for place in range(4 if has_text else 3):
        grid.add_column(justify="right" if place == 2 else "left", no_wrap=True)
    for label, completed, total, text in rows:
        part = completed / max(total, 1)
        made = ProgressBar(total=max(total, 1), completed=completed, width=bar, complete_style="cyan")
        cells = (Text(label), made, Text(f"{part:.0%}"))
        grid.add_row(*cells, *([Text(text, style="dim")] if has_text else []))
    return grid


def _numbers(standing: Standing, width: int, note: str) -> RenderableType:
    rows = list(_rows(standing))
    room = width - max((len(label) for label, _ in rows), default=0) - 2
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, words in rows:
        grid.add_row(label, Text(_flowing(words, room)))
    if note:
        grid.add_row("now", Text(note, style="bold"))
    return grid


def _flowing(words: Sequence[str], room: int) -> str:
    """Names with their numbers in lines of so many columns, none broken at its end."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(_GAP) + len(word) <= room:
            lines[-1] += _GAP + word
        else:
            lines.append(word)
    return "\n".join(lines)


def _rows(standing: Standing) -> Iterator[tuple[str, list[str]]]:
    last = standing.last
    terms = standing.loss_terms()
    if terms:
        loss = terms.pop("loss")
        yield "loss", [f"{loss:.4f}", *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in terms.items())]
    if last is not None:
        yield "rate", [f"{last['learning_rate']:.5g}", f"gradient norm {last['gradient_norm']:.3g}"]
        yield "speed", list(_speed(standing, last.get("peak_memory_bytes")))
    if positives := standing.positives():
        yield "positive", [f"{name} {value:.1%}" for name, value in positives.items()]
    if standing.last_score is not None and standing.best_score is not None:
        best = standing.best_score
        is_best = best == standing.last_score
        yield "mmAP", [_score(standing.last_score), "the best so far" if is_best else f"best {_score(best)}"]
    if survived := [f"{name} {count}" for name, count in standing.survived.items() if count]:
        yield "survived", survived


def _speed(standing: Standing, peak: int | None) -> Iterator[str]:
    if standing.images_a_second is not None:
        yield f"{standing.images_a_second:.1f} images/s"
    yield f"waiting for data {standing.waiting:.0%}"
    if peak is not None:
        yield f"memory {peak / 2**30:.2f} GiB"


def _score(score: Score) -> str:
    masks = "" if score.mask_ap is None else f", masks {percent(score.mask_ap)}"
    return f"{percent(score.ap)} (AP50 {percent(score.ap50)}{masks}) at epoch {score.epoch:.3g}"


def percent(number: float) -> str:
    """A number of 0..1 in percent; -1 means that the ground truth has no such box."""
    return "-" if number < 0 else f"{100 * number:.1f}"
