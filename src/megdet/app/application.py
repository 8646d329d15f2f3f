"""The application: the page, and the endpoint that detects."""

from collections.abc import Collection, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException as RoutingError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

import megdet
from megdet.app.answers import Answer, Classes, Health, Problem, answer_of, classes_of
from megdet.app.batcher import Batcher, FullError, TooManyPixelsError
from megdet.app.guard import Guard
from megdet.app.page import page_text
from megdet.app.requests import IMAGE_TYPES, Limits, answer_in_time, sent_image
from megdet.app.runs import ServedRun
from megdet.errors import InputError, shown

_RETRY_SECONDS = "1"
_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": _FILE}, "required": ["file"]}
_BODY = {
    "required": True,
    "content": {
        **{kind: {"schema": _FILE} for kind in (*IMAGE_TYPES, "application/octet-stream")},
        "multipart/form-data": {"schema": _FORM},
    },
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "No image, or one that cannot be read"},
    404: {"description": "No run of this index or name is served"},
    408: {"description": "The body came too slowly"},
    413: {"description": "The body has too many bytes, or the image too many pixels"},
    415: {"description": "The body is of a type that holds no image"},
    422: {"description": "A parameter of the query cannot be meant"},
    500: {"description": "A fault of the server"},
    503: {
        "description": "Too many requests wait",
        "headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}},
    },
    504: {"description": "No answer in time"},
}
_EVERYWHERE: dict[int | str, dict[str, Any]] = {
    403: {"description": "The request comes from a page of another origin", "model": Problem},
    421: {"description": "The request is for another host", "model": Problem},
}


def make_application(batcher: Batcher, limits: Limits, hosts: Collection[str] = ()) -> ASGIApp:
    """The application over the detectors of a batcher.

    Args:
        batcher: it has the runs; whoever made it closes it.
        limits: of one request.
        hosts: names under which the server may be asked for, besides localhost and numeric addresses.
    """
    page = page_text()
    app = FastAPI(
        title="MegDet",
        summary="Finds objects in images.",
        version=megdet.__version__,
        docs_url=None,  # its page would be fetched from elsewhere
        redoc_url=None,
        responses=_EVERYWHERE,
    )
    _explain_refusals(app)

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    def refuse_if_stopped() -> None:
        if not batcher.is_alive:
            raise HTTPException(503, "the detectors have stopped; start the server again")

    @app.get("/api/health")
    async def health() -> Health:
        """Whether the server works, and how much it has to do."""
        refuse_if_stopped()
        return Health(
            status="ok",
            waiting=batcher.waiting,
            most_waiting=batcher.most_waiting,
            answered=batcher.answered,
            calls=batcher.calls,
        )

    @app.get("/api/classes")
    async def classes() -> Classes:
        """The runs that are served, with their classes."""
        return classes_of(batcher.runs, limits.max_bytes)

    choices = [*map(str, range(len(batcher.runs))), *(run.name for run in batcher.runs)]

    @app.post(
        "/api/detect",
        response_model=Answer,
        responses={status: {**own, "model": Problem} for status, own in _REFUSALS.items()},
        openapi_extra={"requestBody": _BODY},
    )
    async def detect(
        request: Request,
        run: Annotated[
            str, Query(description="index or name of a run (/api/classes)", json_schema_extra={"enum": list(choices)})
        ] = "0",
        score: Annotated[
            float, Query(ge=0, le=1, allow_inf_nan=False, description="leave out objects of a lower score")
        ] = 0.0,
    ) -> Answer | Response:
        """The objects in an image: the body is the file, or a form with one file. Requests that wait share a batch."""
        index = _index_of(run, batcher.runs)
        refuse_if_stopped()
        try:
            with batcher.place() as place:
                answer = place.submit(index, await sent_image(request, limits))
            found = await answer_in_time(answer, request, limits.seconds)
        except FullError as error:
            raise HTTPException(503, f"{error}: try again", {"Retry-After": _RETRY_SECONDS}) from None
        except TooManyPixelsError as error:
            raise HTTPException(413, str(error)) from None
        except InputError as error:
            raise HTTPException(400, str(error)) from None
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        return answer_of(batcher.runs[index], found, score)

    return Guard(app, hosts, page)


def _index_of(run: str, runs: Sequence[ServedRun]) -> int:
    names = [own.name for own in runs]
    # a number is an index, also where a folder is called so: the page asks by index
    if run.isascii() and run.isdecimal() and len(run) < 9 and int(run) < len(runs):
        return int(run)
    if run in names:
        return names.index(run)
    raise HTTPException(404, f"no run {shown(run)}; there are {', '.join(f'{i} ({n})' for i, n in enumerate(names))}")


def _explain_refusals(app: FastAPI) -> None:
    """Every refusal is a Problem: one line."""

    @app.exception_handler(RoutingError)
    async def refused(_: Request, error: RoutingError) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def not_meant(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse({"error": "a fault of the server; its terminal says more"}, 500)
