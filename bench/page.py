"""docs/benchmarks.md from the results in docs/benchmarks.json: sections, their benchmarks and how each is shown."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]
Result = Mapping[str, Any]
Table = Callable[[Result], list[str]]

GPU = "gpu"  # the one that a machine without a GPU leaves out
HEAD = (
    "Written by `make bench` from `docs/benchmarks.json`. The sides run in turn; compare ratios, since the speed of a "
    "shared machine drifts. A number is the median; in brackets are the smallest and the largest, those of a ratio "
    "taken round by round."
)


@dataclass(frozen=True)
class Section:
    """A heading of the page: what is compared, the benchmarks by name with their command lines, and what it tells."""

    title: str
    text: str
    benches: Mapping[str, str]
    table: Table
    reason: str = ""


def write_page(results: Mapping[str, Entry]) -> str:
    """The whole page.

    Args:
        results: entries as in docs/benchmarks.json, by name.
    """
    lines = ["# Benchmarks", "", _wrap(HEAD), ""]
    return "\n".join([*lines, *(line for section in SECTIONS for line in _section(section, results))])


def _section(section: Section, results: Mapping[str, Entry]) -> list[str]:
    known = {name: results[name] for name in section.benches if name in results}
    lines = [f"## {section.title}", "", _wrap(section.text), "", "```sh"]
    for name, command in section.benches.items():
        # what was really run, which may be older than today's settings
        lines.append(known[name]["command"].removesuffix(" --json") if name in known else f"python bench/{command}")
    lines += ["```", ""]
    for name, entry in known.items():
        lines += [*([_failed(name, entry["error"])] if "error" in entry else section.table(entry["result"])), ""]
    if missing := [name for name in section.benches if name not in known]:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    if known:
        lines += [*_origins(known), ""]
    if section.reason and any("result" in entry for entry in known.values()):
        lines += [_wrap(section.reason), ""]
    return lines


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _failed(name: str, error: str) -> str:
    return f"{name} **failed**: `{' '.join(error.split()).replace('`', chr(39))}`"


def _origins(entries: Mapping[str, Entry]) -> list[str]:
    """When, where and with what; one line for all where it is the same for all."""
    texts: dict[str, list[str]] = {}
    for name, entry in entries.items():
        texts.setdefault(_origin(entry), []).append(name)
    if len(texts) == 1:
        return [*texts]
    return [f"- {', '.join(names)}: {text}" for text, names in texts.items()]


def _origin(entry: Entry) -> str:
    machine, versions, git = entry["machine"], entry["versions"], entry["git"]
    cpu = machine["cpu"]
    memory = f", {cpu['memory_bytes'] / 2**30:.0f} GiB" if cpu["memory_bytes"] else ""
    bf16 = " with bfloat16" if machine["native_bf16"] else ""
    gpus = ", ".join(device["name"] for device in machine["devices"]) or "no GPU"
    parts = [f"{name} {number.partition('+')[0]}" for name, number in versions.items()]
    commit = f", commit {git['commit'][:7]}{' with changes' if git['dirty'] else ''}" if git else ""
    where = f"{cpu['cores']} cores of {cpu['model']}{bf16}{memory}, {gpus}"
    return f"{entry['date'][:10]}, {where}; {', '.join(parts)}{commit}."


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


def _against_torchvision(result: Result) -> list[str]:
    """A row a side: train_step and inference."""
    rows = [[_setting(result), "seconds", "images a second", "against torchvision fp32", "against torchvision's best"]]
    for name, seconds in result["seconds"].items():
        is_reference = name == "torchvision fp32"
        ratio = "1" if is_reference else _spread(result["ratios"][name], result["ratio_spread"][name])
        best = _number(result["ratio_to_torchvision_best"]) if name.startswith("megdet") else ""
        speed = _number(result["images_per_second"][name])
        rows.append([_bold(name), _spread(seconds, result["spread"][name]), speed, ratio, best])
    return _table(*rows)


def _train_step(result: Result) -> list[str]:
    limit = (
        f"{result['flops'] / 1e9:.0f} GFLOP a step of ours, {result['fraction_of_limit']:.0%} of the limit of "
        f"{result['limit_flops_per_second'] / 1e9:.0f} GFLOP/s ({result['precision']}); {result['rounds']} rounds."
    )
    own = "each side in a process of its own" if result["processes"] == "own" else "all sides in one process"
    return [*_against_torchvision(result), "", f"{limit[:-1]}, {own}."]


def _memory(result: Result) -> list[str]:
    rows = [[f"{_setting(result)}, {result['precision']}", "peak, MiB", "against torchvision"]]
    for name, peak in result["mib"].items():
        rows.append([_bold(name), _spread(peak, result["spread"][name]), _number(result["ratios"][name])])
    return _table(*rows)


def _batch_norm(result: Result) -> list[str]:
    rows = [[f"{_setting(result)} a process, {result['format']}", "ms", "over local"]]
    for name, time in result["milliseconds"].items():
        over = time / result["milliseconds"]["local"]
        rows.append([_bold(name), _spread(time, result["spread"][name]), _number(over)])
    return _table(*rows)


def _recompute(result: Result) -> list[str]:
    what = "whole detector" if result["whole"] else "backbone"
    head = [f"{what}, {_setting(result)}", "kept, MiB", "times less", "at most, MiB", "times less", "seconds"]
    rows = [[*head, "times as long"]]
    for row in result["rows"]:
        memory = [_number(row[key]) for key in ("kept_mib", "kept_ratio", "peak_mib", "peak_ratio")]
        time = _spread(row["seconds"], row["seconds_spread"])
        rows.append([f"`{row['plan']}`", *memory, time, _spread(row["time_ratio"], row["time_ratio_spread"])])
    return _table(*rows)


def _data(result: Result) -> list[str]:
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


def _evaluation(result: Result) -> list[str]:
    rows = [["side", "seconds of the processor", "seconds of the clock", "peak memory"]]
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
    return [*_table(*rows), "", _wrap(told)]


def _gpu(result: Result) -> list[str]:
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


def _plan(result: Result) -> list[str]:
    head = ["devices", "micro-batch", "lane width", "recompute", "predicted, s", "real, s", "ratio"]
    rows = [[*head, "predicted, GiB", "real, GiB", "ratio"]]
    for row in result["rows"]:
        layout = [str(row[key]) for key in ("devices", "micro_batch", "lane_width")]
        time = [_number(row["predicted_seconds"]), _spread(row["seconds"], row["spread"])]
        memory = [_number(row[key] / 2**30) for key in ("predicted_bytes", "bytes")]
        ratios = [
            f"{row[key]:.2f}{'' if row['within'][what] else ', **missed**'}"
            for key, what in (("seconds_ratio", "time"), ("bytes_ratio", "memory"))
        ]
        rows.append([*layout, f"`{row['recompute']}`", *time, ratios[0], *memory, ratios[1]])
    setting = f"{result['backbone']}, {result['size']} px, {result['batch']} images a step, BN size {result['bn']}"
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


SECTIONS = (
    Section(
        "A training step",
        "ResNet-50 FPN Faster R-CNN beside torchvision's: random weights, trained batch norm, 8 boxes an image, "
        "forward, backward and SGD. The limit is the speed of one 3 x 3 convolution of 256 channels, timed in the "
        "same rounds; only convolutions and matrix products count as FLOPs, and RoIAlign, batch norm, activations, "
        "sorting, NMS and the optimizer have none.",
        {
            f"train_step/{size}-{precision}": f"train_step.py --size {size} --batch {batch} --precision {precision}"
            for size, batch in ((320, 2), (800, 1))
            for precision in ("fp32", "bf16")
        }
        | {
            f"train_step/{size}-{precision}-one-process": (
                f"train_step.py --size {size} --batch {batch} --precision {precision} --one-process"
            )
            for size, batch in ((320, 2), (800, 1))
            for precision in ("fp32", "bf16")
        },
        _train_step,
        "What makes the difference: RoIAlign as one weighted embedding bag over all levels, the RPN's loss at the "
        "sampled anchors only, channels-last memory throughout, and an allocator that keeps freed memory for the "
        "next step. In one process torchvision has the last too, which is worth a third of its time at 800 px.",
    ),
    Section(
        "Memory",
        "The most that a training step of the same model needs, less what the process has after its imports (on a "
        "GPU: of what was allocated). Every side runs in processes of its own, recompute off.",
        {
            "memory/320": "memory.py --size 320 --batch 2",
            "memory/800": "memory.py --size 800 --batch 1",
        },
        _memory,
    ),
    Section(
        "Inference",
        "The same two models with the same weights detect: 1,000 proposals, 100 detections, each in its process. Our "
        "batch norms are folded into the convolutions.",
        {
            f"inference/{size}-{precision}": f"inference.py --size {size} --batch {batch} --precision {precision}"
            for size, batch in ((320, 2), (800, 1))
            for precision in ("fp32", "bf16")
        },
        _against_torchvision,
    ),
    Section(
        "Cross-device batch norm",
        "The 53 batch norms of ResNet-50, forward and backward, over two processes of one thread (gloo), beside "
        "torch's local batch norm: ours merged and in two passes, and Algorithm 1 on differentiable all-reduces. "
        "Each layer's median is added up; in brackets are the sums of single rounds.",
        {
            f"batch_norm/{layout}": f"batch_norm.py --size 320 --batch 2 --format {layout}"
            for layout in ("channels_last", "contiguous")
        },
        _batch_norm,
    ),
    Section(
        "Recompute",
        "What each plan of `recompute` keeps between forward and backward, what both need at most, and what it "
        "costs, for the backbone alone and for the whole detector.",
        {
            "recompute/backbone": "recompute.py --backbone resnet50 --size 512 --batch 4",
            "recompute/whole": "recompute.py --backbone resnet50 --size 512 --batch 4 --whole",
        },
        _recompute,
    ),
    Section(
        "Input",
        "JPEG files of 640 x 480 pixels to uint8 tensors of 800 x 1067, bilinear with antialias, one thread. The "
        "time is the processor's, so that a neighbour on the machine does not count.",
        {"data": "data.py --rounds 15"},
        _data,
        "The cached files were in the system's memory: a disk may be slower than the decoder. What makes the "
        "difference: arithmetic on 8-bit numbers, channels last from the decoder to the canvas, and no detour over "
        "four channels.",
    ),
    Section(
        "Evaluation",
        "The twelve COCO numbers from two JSON files of a drawn set with 80 classes and some 7 boxes an image.",
        {"evaluation": "evaluation.py --images 5000 --detections 500000"},
        _evaluation,
        "What makes the difference: all images and classes choose their boxes together, in columns of NumPy.",
    ),
    Section(
        "Planner",
        "What `megdet plan` predicts beside what `megdet train` then does on the same machine: the layout that "
        "training chooses, with a micro-batch that was not measured. Several devices are processes side by side, "
        "which talk by gloo. A ratio is the prediction over the real value; a real time is the median of the run's "
        "own steps.",
        {"plan": "plan.py --devices 1,2"},
        _plan,
    ),
    Section(
        "GPU",
        "A training step of 800 x 1344 pixels where there is a GPU: torchvision's, ours and ours compiled. Of peak: "
        "what convolutions and matrix products use of the data sheet's arithmetic; waits: how often the host waited "
        "for the GPU in a step. Stages are timed on the GPU's stream and include waiting for the host.",
        {GPU: "gpu.py"},
        _gpu,
    ),
)

COMMANDS = {name: command for section in SECTIONS for name, command in section.benches.items()}
