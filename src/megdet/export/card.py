"""The model card beside an exported file: what it is, what it takes and gives, how good it is, and how to run it."""

from typing import Any

from megdet.data.plan import evaluation_scales
from megdet.export.files import OUTPUTS
from megdet.export.proof import Proof, markdown
from megdet.exported.description import Description

_MEANING = {
    "boxes": ("float32, images x {most} x 4", "x1, y1, x2, y2 in pixels of the canvas, best first"),
    "scores": ("float32, images x {most}", "0 to 1; 0 in rows for nothing"),
    "labels": ("int64, images x {most}", "places in the list of classes; -1 in rows for nothing"),
    "masks": ("float32, images x {most} x rows x columns", "how probable the object is on a grid over its box"),
}


def model_card(file_name: str, description: Description, proof: Proof) -> str:
    """The card as Markdown."""
    recipe = description.parsed
    model: Any = recipe.model
    data = recipe.data
    most = next(section.detections for section in vars(model).values() if hasattr(section, "detections"))
    names = OUTPUTS if description.has_masks else OUTPUTS[:3]
    outputs = [("output", "type", "what"), *((name, _MEANING[name][0], _MEANING[name][1]) for name in names)]
    table = markdown(outputs).format(most=most)
    (edge,) = evaluation_scales(recipe)
    rounded = f"a multiple of {data.canvas_multiple}"
    if data.canvas_edges:
        rounded = f"the next of {', '.join(map(str, data.canvas_edges))}, beyond these to {rounded}"
    kind = "float32" if data.resize == "torchvision" else "uint8"
    classes = ", ".join(name.replace("`", "'").replace("\n", " ") for name in description.class_names)
    of_all = "all" if proof.images == proof.of_images else f"{proof.images} of"
    verdict = "holds" if proof.holds else "does NOT hold"
    return f"""# {file_name}

A {model.kind} detector with the backbone {model.backbone.name}, exported by MegDet {description.megdet} after
{description.step} training steps. Batch norms are folded; normalisation and NMS are in the graph.

- classes ({len(description.class_names)}): {classes}
- trained on `{data.train_annotations}`, {recipe.batch_size} images a step, BN size {recipe.bn_size}
- SHA-256 of the weights: `{description.weights}`
- the complete recipe, classes and canvas stand in the file's metadata, under `megdet`

## Input and output

| input | type | what |
|---|---|---|
| pixels | {kind}, images x 3 x height x width | RGB, 0 to 255, each image in the upper left corner of its canvas |
| sizes | int64, images x 2 | height and width in pixels of each image on the canvas |

{table}

An image is resized so that its shorter edge has {edge} pixels, unless the longer one would exceed
{data.max_long_edge * edge / data.short_edges[-1]:g}. The canvas's edges are those of the image rounded up to {rounded}.
Divide boxes by the scale to have pixels of the file.

## Run it

```python
import numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession("{file_name}")
image = numpy.asarray(Image.open("image.jpg").convert("RGB"), "{kind}")  # resize it first, see above
pixels = image.transpose(2, 0, 1)[None]
sizes = numpy.array([pixels.shape[2:]])
boxes, scores, labels = session.run(None, {{"pixels": pixels, "sizes": sizes}})[:3]
```

or, without torch, `megdet detect {file_name} image.jpg`.

## Proof

On {of_all} {proof.of_images} images of `{proof.annotations}`, beside the detector in {proof.precision}. It
{verdict}: no AP may differ by more than {100 * proof.allowed:g} points; the most is {100 * proof.worst:.3f}.

{markdown(proof.rows())}

`same` counts the detections that both have (one class, an overlap of at least 0.5), `unmatched` those of one side,
`box` and `score` are the largest differences. Batches get the same pixels as the detector; `files` reads and resizes
the files itself.{f" {proof.warning}" if proof.warning else ""}
{_quantized(proof)}"""


def _quantized(proof: Proof) -> str:
    """How the file came to its 8-bit integers, where it has some."""
    own = proof.int8
    if own is None:
        return ""
    before, after = own.before, own.after
    return f"""
## 8-bit integers

{own.layers} layers compute with 8-bit integers; {own.float_layers} that predict, and the rest of the graph, in float32.
Ranges of numbers are those of {own.images} training images ({own.method}).

| | MB | s an image |
|---|---|---|
| float32 | {before.bytes / 1e6:.1f} | {before.seconds:.4f} |
| this file | {after.bytes / 1e6:.1f} | {after.seconds:.4f} |

Seconds of the processor that exported it, for an image alone in its batch, the median of {own.timed}.
"""
