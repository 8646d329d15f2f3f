"""docs/benchmarks.md from the results in docs/benchmarks.json: sections, their benchmarks and how each is shown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tables

Entry = Mapping[str, Any]

GPU = "gpu"  # the one that a machine without a GPU leaves out
HEAD = (
    "Written by `make bench` from `docs/benchmarks.json`. The sides run in turn; compare ratios, since the speed of a "
    "shared machine drifts. A number is the median; in brackets are the smallest and the largest, those of a ratio "
    "taken round by round."
)

NOT_RUN = "<!-- not in CI: measures for minutes on a quiet machine -->"
"""Before the commands: the check that runs those of all pages leaves them out."""


@dataclass(frozen=True)
class Section:
    """A heading of the page: what is compared, the benchmarks by name with their command lines, and what it tells."""

    title: str
    text: str
    benches: Mapping[str, str]
    table: Callable[[tables.Result], list[str]]
    reason: str = ""


def write_page(results: Mapping[str, Entry]) -> str:
    """The whole page.

    Args:
        results: entries as in docs/benchmarks.json, by name.
    """
    lines = ["# Benchmarks", "", tables.wrap(HEAD), ""]
    return "\n".join([*lines, *(line for section in SECTIONS for line in _section(section, results))])


def _section(section: Section, results: Mapping[str, Entry]) -> list[str]:
    known = {name: results[name] for name in section.benches if name in results}
    lines = [f"## {section.title}", "", tables.wrap(section.text), "", NOT_RUN, "```sh"]
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
        lines += [tables.wrap(section.reason), ""]
    return lines


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


SECTIONS = (
    Section(
        "A training step",
        "ResNet-50 FPN Faster R-CNN beside torchvision's: the same random weights, trained batch norm, 2,000 proposals "
        "and 8 boxes an image, forward, backward and SGD, both sides from one recipe. The limit is the speed of one "
        "3 x 3 convolution of 256 channels, timed in the same rounds; only convolutions and matrix products count as "
        "FLOPs, one in Winograd's form as the plain one that it stands for, and RoIAlign, batch norm, activations, "
        "sorting, NMS and the optimizer have none. First all sides in one process, where torchvision has our "
        "allocator's habit of keeping memory; then each in its own, as its users have it.",
        {
            f"train_step/{size}-one": f"train_step.py --size {size} --batch {batch} --one-process"
            for size, batch in ((320, 2), (800, 1))
        }
        | {
            f"train_step/{size}-{precision}": f"train_step.py --size {size} --batch {batch} --precision {precision}"
            for size, batch in ((320, 2), (800, 1))
            for precision in ("fp32", "bf16")
        },
        tables.train_step,
        "What makes the difference: RoIAlign as one weighted embedding bag over all levels, the RPN's loss at the "
        "sampled anchors only, in float32 3 x 3 convolutions in Winograd's form, channels-last memory throughout, an "
        "allocator that keeps freed memory for the next step, and on processors that are not Intel's matrix products "
        "by oneDNN, where torch's go to MKL, which has half its speed there.",
    ),
    Section(
        "Where a step's time goes",
        "The same step by stage, forward and backward, beside what its convolutions and matrix products would take at "
        "the limit. A stage in Winograd's form may be faster than that; what has no FLOPs has no limit here.",
        {
            f"stages/{size}{suffix}": f"stages.py --size {size} --batch {batch}{side}"
            for size, batch in ((320, 2), (800, 1))
            for suffix, side in (("", ""), ("-torchvision", ' --side "torchvision channels_last"'))
        },
        tables.stages,
        "What is over the limit at 320 px on the AMD EPYC: in the backbone a third is batch norm, activations, "
        "additions and outputs of norms that are computed again, the rest the library's own convolutions, which reach "
        "40 to 95% of the limit (strided ones, small maps and gradients of weights least); then the proposals, whose "
        "NMS is quadratic and uses one thread an image and level, and the optimizer, which is bound by memory. 80% of "
        "the limit, which we aimed at, is not reached at 320 px.",
    ),
    Section(
        "1 x 1 convolutions on one thread",
        "All 1 x 1 convolutions of stride 1 of ResNet-50, float32: torch computes fewer than 16 images on one thread "
        "by MKL, MegDet by oneDNN unless the processor is Intel's. So it is with a rank a core, with `exact`, and "
        "where an evaluation computes images side by side.",
        {"pointwise": "pointwise.py --size 320 --batch 2"},
        tables.pointwise,
    ),
    Section(
        "A training step of other detectors",
        "Mask R-CNN and RetinaNet on ResNet-50 FPN beside torchvision's, as above: Mask R-CNN learns the ellipse in "
        "each box; RetinaNet has one stage, no proposals and no samples.",
        {
            f"train_step/{kind}": f"train_step.py --size 320 --batch 2 --model {kind}"
            for kind in ("mask_rcnn", "retinanet")
        },
        tables.train_step,
    ),
    Section(
        "3 x 3 convolutions",
        "In Winograd's form and by oneDNN, float32 on a CPU, in turn: milliseconds, the fastest of the rounds. The "
        "error is that of the output, the root of the mean squared difference to float64 in units of the output's "
        "own size.",
        {"winograd": "winograd.py --rounds 9"},
        tables.winograd,
        "A convolution with fewer than 128 channels or a map of fewer than 40 tiles of 4 x 4 stays oneDNN's; where "
        "oneDNN multiplies matrices faster than MKL, one with fewer than 256 channels or 150 tiles, and one whose "
        "tiles cover over 1.2 times the map, as those of 14 x 14 and of 7 x 7 pixels.",
    ),
    Section(
        "Memory",
        "The most that a training step of the same model needs, less what the process has after its imports (on a "
        "GPU: of what was allocated). Every side runs in processes of its own, recompute off.",
        {
            "memory/320": "memory.py --size 320 --batch 2",
            "memory/800": "memory.py --size 800 --batch 1",
        },
        tables.memory,
        "Weights and momentum are 318 MiB of it on every side; gradients come while activations go. We aimed at 0.8 "
        "and 0.7 times torchvision's, and at 0.8 of what a process has: not reached without recomputing blocks, which "
        "has a price in time (below). Outputs of batch norms and residual sums are computed again even so; the sums "
        "save 6% of the memory at 320 px and 11% at 800 px, and old and new in turn a step takes 0 to 3% longer. Tried "
        "and dropped: huge pages, and half the tiles of Winograd's form at a time (3% less at 320 px, 5% slower at "
        "800 px). The process of the demo peaks at 1.5 GB (we aimed at 1 GB): 0.78 GB are there after the imports, of "
        "which torch's library is 0.46 and its compiler, which torchvision loads, 0.16.",
    ),
    Section(
        "Inference",
        "The same two models with the same weights detect: 1,000 proposals, 100 detections, each in its process. Our "
        "batch norms are folded into the convolutions.",
        {
            f"inference/{size}-{precision}": f"inference.py --size {size} --batch {batch} --precision {precision}"
            for size, batch in ((320, 2), (800, 1))
            for precision in ("fp32", "bf16")
        }
        | {
            f"inference/{size}-one": f"inference.py --size {size} --batch {batch} --one-process"
            for size, batch in ((320, 2), (800, 1))
        },
        tables.inference,
        "In float32 we aimed at 1.7 times torchvision at 320 px and at 2.2 at 800 px, in one process too. Both run the "
        "same convolutions and matrix products: what is won is Winograd's form, the products by oneDNN, folded norms "
        "and RoIAlign.",
    ),
    Section(
        "A busy machine",
        "The step of the demo alone and beside another training on the same cores, by how long an OpenMP thread that "
        "waits for another one looks again before it gives its core away. `torch` is what it does where nobody says "
        "anything. Half of what a training reaches alone is a fair share.",
        {"busy_machine": "busy_machine.py"},
        tables.busy_machine,
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
        tables.batch_norm,
    ),
    Section(
        "Recompute",
        "What each plan of `recompute` keeps between forward and backward, what both need at most, and what it "
        "costs, for the backbone alone and for the whole detector.",
        {
            "recompute/backbone": "recompute.py --backbone resnet50 --size 512 --batch 4",
            "recompute/whole": "recompute.py --backbone resnet50 --size 512 --batch 4 --whole",
        },
        tables.recompute,
    ),
    Section(
        "Input",
        "JPEG files of 640 x 480 pixels to uint8 tensors of 800 x 1067, bilinear with antialias, one thread. The "
        "time is the processor's, so that a neighbour on the machine does not count.",
        {"data": "data.py --rounds 15"},
        tables.data,
        "The cached files were in the system's memory: a disk may be slower than the decoder. What makes the "
        "difference: arithmetic on 8-bit numbers, channels last from the decoder to the canvas, and no detour over "
        "four channels.",
    ),
    Section(
        "Images far away",
        "Batches of 16 JPEG files of 640 x 480 pixels, resized to 800 x 1067, loaded by one process: from a folder, "
        "from a zip, and from a web server of this machine that waits 20 ms before each answer, by the clock.",
        {"far": "far.py --rounds 7 --milliseconds 20"},
        tables.far,
    ),
    Section(
        "Starting on a large data set",
        "What a run reads before its first step: annotations with polygons as long as COCO's and the headers of "
        "118,000 images. Every start is a process of its own; its imports do not count.",
        {"annotations": "annotations.py --rounds 3"},
        tables.annotations,
        "The first start decodes the annotation file and reads the headers; later ones hash the file and ask for the "
        "time and length of every image. The other ranks of a host do neither.",
    ),
    Section(
        "Evaluation",
        "The twelve COCO numbers from two JSON files of a drawn set with 80 classes and some 7 objects an image: of "
        "boxes, then of masks, with which ours counts the boxes around them too.",
        {
            "evaluation": "evaluation.py --images 5000 --detections 500000",
            "evaluation/masks": "evaluation.py --images 5000 --detections 500000 --kind segm",
        },
        tables.evaluation,
        "The table of boxes is of counting in columns of NumPy, which hotcoco has replaced. On the same files, in "
        "one run on one thread of a busy machine, counting by hotcoco takes 2.2 to 2.6 s of the processor and "
        "0.31 GB (hotcoco alone, without our checks of the rows: 1.1 s); faster-coco-eval 1.8.0 takes 9.8 s and "
        "1.29 GB. For 100,000 masks of such images pycocotools takes 44 s, faster-coco-eval 12.5 s, hotcoco alone "
        "1.5 s, and ours 7.5 s with the numbers of the boxes. All have the same numbers to 1e-6.",
    ),
    Section(
        "Gradient noise scale",
        "A training step of ResNet-50 FPN that measures the noise scale from two halves of its groups, beside one that "
        "does not.",
        {"noise_scale": "noise_scale.py --size 320 --batch 4 --bn 2"},
        tables.noise_scale,
    ),
    Section(
        "Planner",
        "What `megdet plan` predicts beside what `megdet train` then does on the same machine: the layout that "
        "training chooses, with a micro-batch that was not measured. Several devices are processes side by side, "
        "which talk by gloo. An error is what was predicted too much, as a part of the real value, or with a minus too "
        "little; a real time is the median of the run's own steps. Memory is foretold a little too low because the "
        "heap grows over the first steps of a run.",
        {
            "plan": "plan.py --devices 1,2",
            "plan/three": "plan.py --devices 1 --bn 4 --sizes 1,2,3",
            "plan/lane-2": "plan.py --devices 2 --lane-width 2 --bn 12 --batch 24",
            "plan/lane-4": "plan.py --devices 4 --lane-width 4 --bn 12 --batch 24 --sizes 1,2",
            "plan/bfloat16": "plan.py --devices 1,2 --precision bfloat16",
            "plan/mobilenet": "plan.py --devices 1,2 --backbone mobilenetv2_100",
            "plan/resnet50": "plan.py --devices 1 --backbone resnet50",
        },
        tables.plan,
    ),
    Section(
        "Scale",
        "The same mini-batch on 1, 2, 4, ... processes of one machine, each with one thread, which talk by gloo: "
        "seconds of a step, the part that waits for images, the part that rank 0 spends in collectives (waiting for "
        "slower ranks included; by Python's profiler, in a run of its own), and what `megdet plan` predicts.",
        {"scale": "scale.py"},
        tables.scale,
    ),
    Section(
        "Start",
        "Processor seconds, user and system, of a process from its start to its end: verbs that compute nothing, and "
        "what loading costs those that do, one package more a line; the last two lines load and end as `megdet` does.",
        {"startup": "startup.py"},
        tables.startup,
        "A verb's modules are imported when it is called. Imports leave a million objects, so `megdet` imports without "
        "Python's garbage collector, which would look through them again and again, and at its end the system takes "
        "the memory back at once, instead of Python object by object (`program.py`). Weights & Biases, which timm "
        "imports where it is installed, is kept out. torch's compiler is more than a quarter of a plain import, "
        "and nothing of it is used: torchvision's RoIAlign and a model of timm's import it when they are loaded, and "
        "torch's optimizers do when they are made. Keeping it out would mean to replace parts of torch meanwhile.",
    ),
    Section(
        "GPU",
        "A training step of 800 x 1344 pixels where there is a GPU: torchvision's, ours and ours compiled. Of peak: "
        "what convolutions and matrix products use of the data sheet's arithmetic; waits: how often the host waited "
        "for the GPU in a step. Stages are timed on the GPU's stream and include waiting for the host. `--tests` runs "
        "the GPU tests first, `--out FILE` is written after every line, and no line is begun after `--minutes` (8).",
        {GPU: "gpu.py"},
        tables.gpu,
    ),
)

COMMANDS = {name: command for section in SECTIONS for name, command in section.benches.items()}
