"""What the HTTP endpoint answers: its models, as the OpenAPI description shows them."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from megdet.app.batcher import Found
from megdet.app.runs import ServedRun


class Problem(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="one line: what is wrong, and how to mend it")


class Mask(BaseModel):
    """The pixels of an object as runs, as COCO has them (RLE)."""

    size: tuple[int, int] = Field(description="height and width of the image in pixels")
    counts: str = Field(description="lengths of runs in COCO's compressed text, column by column")


class FoundObject(BaseModel):
    """One object."""

    box: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2 in pixels of the image")
    score: float = Field(ge=0, le=1)
    label: int = Field(ge=0, description="place of its class among those of the run")
    name: str = Field(description="name of its class")
    category_id: int | str = Field(description="its class's number in the COCO file that the run was trained on")
    mask: Mask | None = Field(description="null where the run finds no masks")


class Answer(BaseModel):
    """What a run finds in one image."""

    run: str = Field(description="name of the run")
    height: int = Field(description="of the image in pixels, turned as its EXIF note says")
    width: int = Field(description="of the image in pixels")
    milliseconds: float = Field(description="of the call of the detector that looked at this image")
    images_together: int = Field(ge=1, description="images that this call looked at, from requests that waited")
    objects: list[FoundObject] = Field(description="best first")


class ServedClass(BaseModel):
    """A class that a run knows."""

    label: int
    name: str
    category_id: int | str


class Run(BaseModel):
    """A run that is served."""

    run: int = Field(description="its index, for the query of /api/detect")
    name: str = Field(description="its name, which serves as well")
    has_masks: bool = Field(description="whether it finds the pixels of an object, not its box alone")
    classes: list[ServedClass]


class Classes(BaseModel):
    """The runs that are served, with their classes."""

    runs: list[Run]
    max_bytes: int = Field(description="of the body of a request")


class Health(BaseModel):
    """How the server does."""

    status: Literal["ok"]
    waiting: int = Field(description="requests that are being sent, wait, or are looked at")
    most_waiting: int = Field(description="requests that may wait; more are answered with 503")
    answered: int = Field(description="images looked at since the start")
    calls: int = Field(description="calls of a detector since the start; fewer than images where requests met")


def answer_of(run: ServedRun, found: Found, score: float) -> Answer:
    """What is sent of an image: detections of at least this score."""
    detections = found.detections.above(score)
    height, width = detections.size
    masks = detections.masks or [None] * len(detections)
    rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), masks, strict=True)
    return Answer(
        run=run.name,
        height=height,
        width=width,
        milliseconds=round(1000 * found.seconds, 2),
        images_together=found.together,
        objects=[
            FoundObject(
                box=tuple(round(edge, 3) for edge in box),
                score=round(own, 6),
                label=label,
                name=run.class_names[label],
                category_id=run.category_ids[label],
                mask=None if mask is None else Mask(**mask),
            )
            for box, own, label, mask in rows
        ],
    )


def classes_of(runs: Sequence[ServedRun], max_bytes: int) -> Classes:
    """What clients learn of the runs before they send an image."""
    return Classes(
        runs=[
            Run(
                run=index,
                name=run.name,
                has_masks=run.has_masks,
                classes=[
                    ServedClass(label=label, name=name, category_id=run.category_ids[label])
                    for label, name in enumerate(run.class_names)
                ],
            )
            for index, run in enumerate(runs)
        ],
        max_bytes=max_bytes,
    )
