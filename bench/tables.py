"""How the results of each benchmark are shown: Markdown tables, one function a benchmark."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def wrap(text: str) -> str:
    """A paragraph in lines of 120 characters."""
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _number(value: float) -> str:
    """Two or three digits."""
    size = abs(value)
    digits = ".0f" if size >= 100 else ".1f" if size >= 10 else ".2f" if size >= 0.1 else ".2g"
    return f"{value:{digits}}"


def _spread(value: float, spread: Sequence[float], unit: float = 1) -> str:
    return f"{_number(value * unit)} ({_number(spread[0] * unit)} to {_number(spread[1] * unit)})"


def _table(*rows: Sequence[str]) -> list[str]:
    lines = [("| " + " | ".join(row) + " |").replace("  |", " |") for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith(("megdet", "ours")) else name


def _setting(result: Result) -> str:
    return f"{result['size']} px, batch {result['batch']}"


def against_torchvision(result: Result) -> list[str]:
    """A row a side: train_step and inference."""
    rows = [[_setting(result), "seconds", "images a second", "against torchvision fp32", "against torchvision's best"]]
    for name, seconds in result["seconds"].items():
        is_reference = name == "torchvision fp32"
        ratio = "1" if is_reference else _spread(result["ratios"][name], result["ratio_spread"][name])
        best = _number(result["ratio_to_torchvision_best"]) if name.startswith("megdet") else ""
        speed = _number(result["images_per_second"][name])
        rows.append([_bold(name), _spread(seconds, result["spread"][name]), speed, ratio, best])
    return _table(*rows)


def inference(result: Result) -> list[str]:
    own = "All sides in one process" if result.get("processes") == "one" else "Each side in a process of its own"
    return [*against_torchvision(result), "", f"{own}; {result['rounds']} rounds."]


def train_step(result: Result) -> list[str]:
    limit = (
        f"{result['flops'] / 1e9:.0f} GFLOP a step of ours, {result['fraction_of_limit']:.0%} of the limit of "
        f"{result['limit_flops_per_second'] / 1e9:.0f} GFLOP/s ({result['precision']}); {result['rounds']} rounds"
    )
    own = "each side in a process of its own" if result["processes"] == "own" else "all sides in one process"
    kind = result.get("model", "faster_rcnn")  # which results from before there were others do not say
    return [*against_torchvision(result), "", f"{kind}: {limit}, {own}."]


def stages(result: Result) -> list[str]:
    """A row a stage; what takes no time is left out."""
    rows = [[_setting(result), "forward, ms", "at the limit", "backward, ms", "at the limit", "GFLOP"]]
    for name, row in result["stages"].items():
        if max(row["ms"].values()) < 0.05:
            continue
        times = [f"{row[key][way]:.1f}" for way in ("forward", "backward") for key in ("ms", "ms_at_limit")]
        rows.append([name, *times, f"{sum(row['gflop'].values()):.1f}"])
    limit = result["limit_gflop_per_second"]
    part = 1000 * result["gflop"] / limit / result["ms"]
    whole = f"{result['ms']:.0f} ms a step, {part:.0%} of the limit of {limit:.0f} GFLOP/s; {result['rounds']} steps."
    return [*_table(*rows), "", f"{result['side']}: {whole}"]


def pointwise(result: Result) -> list[str]:
    rows = [[f"{_setting(result)}, one thread", "torch, ms", "megdet, ms", "times as fast", "megdet, GFLOP/s"]]
    for part, theirs in result["ms"]["torch"].items():
        ours = result["ms"]["megdet"][part]
        rows.append(
            [part, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.2f}", f"{result['flops'] / ours / 1e6:.0f}"]
        )
    return _table(*rows)


def winograd(result: Result) -> list[str]:
    """A row a layer; in each cell oneDNN's time, ours, and how many times as fast ours is."""
    rows = [["maps, channels", *result["cases"][0]["ms"], "error, oneDNN's and ours"]]
    for case in result["cases"]:
        images, edge, inputs, outputs = case["case"]
        times = [f"{theirs:.1f}, {ours:.1f}: {theirs / ours:.2f}" for theirs, ours in case["ms"].values()]
        errors = " and ".join(f"{error:.1e}" for error in case["error"])
        rows.append([f"{images} x {edge} x {edge}, {inputs} to {outputs}", *times, errors])
    return _table(*rows)


def busy_machine(result: Result) -> list[str]:
    rows = [["side", "setting", "images a second alone", "against torch", "beside another, each", "of a fair share"]]
    for name, setting in result["settings"].items():
        speeds = (_spread(result[kind][name], result[f"{kind}_spread"][name]) for kind in ("alone", "beside"))
        alone, beside = speeds
        share = f"{result['beside'][name] / (result['alone']['torch'] / 2):.0%}"
        rows.append([_bold(name), f"`{setting}`", alone, _number(result["alone_ratio"][name]), beside, share])
    return _table(*rows)


def memory(result: Result) -> list[str]:
    rows = [[f"{_setting(result)}, {result['precision']}", "peak, MiB", "against torchvision"]]
    for name, peak in result["mib"].items():
        rows.append([_bold(name), _spread(peak, result["spread"][name]), _number(result["ratios"][name])])
    return _table(*rows)


def batch_norm(result: Result) -> list[str]:
    rows = [[f"{_setting(result)} a process, {result['format']}", "ms", "over local"]]
    for name, time in result["milliseconds"].items():
        over = time / result["milliseconds"]["local"]
        rows.append([_bold(name), _spread(time, result["spread"][name]), _number(over)])
    return _table(*rows)


def recompute(result: Result) -> list[str]:
    what = "whole detector" if result["whole"] else "backbone"
    head = [f"{what}, {_setting(result)}", "kept, MiB", "times less", "at most, MiB", "times less", "seconds"]
    rows = [[*head, "times as long"]]
    for row in result["rows"]:
        memory = [_number(row[key]) for key in ("kept_mib", "kept_ratio", "peak_mib", "peak_ratio")]
        time = _spread(row["seconds"], row["seconds_spread"])
        rows.append([f"`{row['plan']}`", *memory, time, _spread(row["time_ratio"], row["time_ratio_spread"])])
    return _table(*rows)


def data(result: Result) -> list[str]:
    rows = [["side", "ms an image", "images a second", "against PIL"]]
    for name, seconds in result["seconds"].items():
        ratio = "1" if name == "PIL" else _spread(result["ratios"][name], result["ratio_spread"][name])
        time = _spread(seconds, result["spread"][name], 1000)
        rows.append([_bold(name), time, _number(result["images_per_second"][name]), ratio])
    versions = ", ".join(f"{name} {number.partition('+')[0]}" for name, number in result["versions"].items())
    return [
        *_table(*rows),
        "",
        f"{result['rounds']} rounds of each side, files of {result['bytes_a_file'] / 1000:.0f} kB, {versions}.",
        f"megdet's resized pixels differ from PIL's by at most {result['largest_difference_from_pil']} of 255.",
    ]


def far(result: Result) -> list[str]:
    rows = [["side", "images a second", "against a local folder"]]
    for name, seconds in result["seconds"].items():
        ratio = "1" if name == "local folder" else _spread(result["ratios"][name], result["ratio_spread"][name])
        rows.append([_bold(name), _number(result["images"] / seconds), ratio])
    starts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["starts"].items())
    return [*_table(*rows), "", f"The sizes of {result['images']} images: {starts}."]


def annotations(result: Result) -> list[str]:
    rows = [["start", "seconds of the clock", "seconds of the processor", "fingerprint", "peak memory"]]
    for name, one in result["starts"].items():
        clock = _spread(one["load"], result["load_spread"][name])
        own = _number(one["processor"]), _number(one["fingerprint"]), f"{one['bytes'] / 1e9:.2f} GB"
        rows.append([name, clock, *own])
    told = f"{result['images']:,} images, an annotation file of {result['file_bytes'] / 1e6:.0f} MB"
    return [*_table(*rows), "", f"{told}, {result['rounds']} starts of each kind."]


def evaluation(result: Result) -> list[str]:
    kind = "masks" if result.get("kind") == "segm" else "boxes"
    rows = [[kind, "seconds of the processor", "seconds of the clock", "peak memory"]]
    for name in ("pycocotools", "megdet"):
        side = result[name]
        clock = _spread(side["seconds"], result["spread"][name])
        rows.append([_bold(name), _number(side["processor_seconds"]), clock, f"{side['peak_bytes'] / 1e9:.2f} GB"])
    told = (
        f"{result['images']:,} images, {result['detections']:,} detections, {result['rounds']} runs of each side, each "
        f"in a process of its own. {_number(result['processor_ratio'])} times as fast by the processor, "
        f"{_spread(result['ratio'], result['ratio_spread'])} by the clock; the largest difference of the twelve "
        f"numbers is {result['largest_difference']:.1g}."
    )
    return [*_table(*rows), "", wrap(told)]


def gpu(result: Result) -> list[str]:
    rows = [["batch", "precision", "side", "images a second", "against torchvision", "of peak", "memory, GB", "waits"]]
    settings: dict[tuple[int, str], float] = {}  # seconds of torchvision, which is the first side
    for row in result["rows"]:
        setting = row["batch"], row["precision"]
        head = [*map(str, setting), _bold(row["side"])]
        if "error" in row:
            rows.append([*head, row["error"], "", "", "", ""])
            continue
        if row["side"] == "torchvision":
            settings[setting] = row["seconds"]
        ratio = _number(settings[setting] / row["seconds"]) if setting in settings else ""
        speed = _spread(row["images_per_second"], [row["batch"] / seconds for seconds in reversed(row["spread"])])
        peak = f"{row['fraction_of_peak']:.0%}" if row["fraction_of_peak"] is not None else ""
        rows.append([*head, speed, ratio, peak, f"{row['peak_memory_bytes'] / 1e9:.1f}", str(row["host_waits"])])
    rounds = f"{result['rounds']} rounds of {result['steps']} steps"
    title = f"{result['device']}, {result['size']} px, CUDA {result['cuda']}; {rounds}."
    return [title, "", *_table(*rows), "", *_stages(result["rows"])]


def noise_scale(result: Result) -> list[str]:
    rows = [[f"{_setting(result)}, BN size {result['bn']}", "seconds a step", "the measured step over it"]]
    for name, seconds in result["seconds"].items():
        ratio = _spread(result["ratios"][name], result["ratio_spread"][name])
        rows.append([name, _spread(seconds, result["spread"][name]), ratio])
    part = f"Measured every {result['interval']} steps it takes {result['part_of_time']:.2%} of the time."
    return [*_table(*rows), "", part]


def plan(result: Result) -> list[str]:
    head = ["devices", "lane width", "micro-batch", "a step", "recompute", "predicted, s", "real, s", "error"]
    rows = [[*head, "predicted, GiB", "real, GiB", "error"]]
    for row in result["rows"]:
        layout = [str(row[key]) for key in ("devices", "lane_width", "micro_batch", "rounds")]
        time = [_number(row["predicted_seconds"]), _spread(row["seconds"], row["spread"])]
        memory = [_number(row[key] / 2**30) for key in ("predicted_bytes", "bytes")]
        ratios = [
            f"{row[key] - 1:+.0%}{'' if row['within'][what] else ', **missed**'}"
            for key, what in (("seconds_ratio", "time"), ("bytes_ratio", "memory"))
        ]
        rows.append([*layout, f"`{row['recompute']}`", *time, ratios[0], *memory, ratios[1]])
    setting = f"{result['backbone']}, {result['size']} px, {result['batch']} images a step, BN size {result['bn']}"
    setting += f", {result.get('precision', 'float32')}"  # which results from before there was a choice do not say
    held = [
        f"{what} is within {limit:.0%} in {sum(row['within'][what] for row in result['rows'])} of {len(result['rows'])}"
        for what, limit in result["limits"].items()
    ]
    return [
        *_table(*rows),
        "",
        f"{setting}; measured with micro-batches of {result['sizes']} images.",
        f"Of these predictions {' and '.join(held)}; the others are marked as missed.",
    ]


def scale(result: Result) -> list[str]:
    head = ["processes", "lane x rounds x images", "seconds", "images a second", "efficiency", "waiting", "collectives"]
    rows = [[*head, "predicted, s", "collectives, predicted"]]
    for row in result["rows"]:
        spread = f"{row['lane_width']} x {row['rounds']} x {row['micro_batch']}"
        parts = [f"{row[key]:.0%}" for key in ("efficiency", "waiting", "collectives")]
        predicted = [_number(row["predicted_seconds"]), f"{row['predicted_collectives']:.0%}"]
        real = [_spread(row["seconds"], row["spread"]), _number(row["images_per_second"])]
        rows.append([str(row["devices"]), spread, *real, *parts, *predicted])
    setting = f"{result['backbone']}, {result['size']} px, {result['batch']} images a step, BN size {result['bn']}"
    return [*_table(*rows), "", f"{setting}; {result['cores']} cores, one a process."]


def _stages(rows: Sequence[Result]) -> list[str]:
    """Milliseconds of the stages, in the last precision alone: the table is long enough."""
    shown = [row for row in rows if "error" not in row and row["precision"] == rows[-1]["precision"]]
    names = list(dict.fromkeys(name for row in shown for name in row["stage_milliseconds"]))
    cells = [
        [_number(row["stage_milliseconds"][n]) if n in row["stage_milliseconds"] else "" for n in names]
        for row in shown
    ]
    heads = [[str(row["batch"]), _bold(row["side"])] for row in shown]
    body = [[*head, *own] for head, own in zip(heads, cells, strict=True)]
    return _table([f"ms, {rows[-1]['precision']}: batch", "side", *names], *body) if shown else []


def startup(result: Result) -> list[str]:
    """A row a process."""
    rows = [["process", "processor seconds"]]
    rows += [[f"`{name}`", _spread(seconds, result["spread"][name])] for name, seconds in result["seconds"].items()]
    return [*_table(*rows), "", f"{result['rounds']} processes of each, in turn."]
