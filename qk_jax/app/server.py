"""The web server: the page, its files, and the REST interface that it is a client of."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteError

import qk_jax
from qk_jax.app import forms, guard, intake, jobs, work
from qk_jax.app.models import Models
from qk_jax.base import files
from qk_jax.base.errors import InputError
from qk_jax.diffusion import sampler
from qk_jax.pictures import sizes
from qk_jax.pictures.decoding import MAX_PIXELS

ASSETS = files.Path(qk_jax.__file__).parent / "assets"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
STILL_HERE = 15.0  # seconds between two signs of life of a stream of events
QUICK = 0.05  # seconds in which only the last of several changes is told
REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": forms.ErrorView, "description": "something that was given is wrong"}
}
FULL: dict[int | str, dict[str, Any]] = {
    429: {"model": forms.ErrorView, "description": "too many jobs are waiting"}
}
UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": forms.ErrorView, "description": "there is no such job, or not any more"}
}
EVENTS = f"\n\nWith `Accept: text/event-stream` a stream of events, at most {1 / QUICK:.0f} of a \
kind a second: `state`, whose data is what is told here, and `preview`, whose data has the number \
of the picture, its step, and the picture."


def _job_of(job_id: str, request: Request) -> jobs.Job:
    """The job of an address."""
    job = request.app.state.queue.find(job_id)
    if job is None:
        raise HTTPException(404, "there is no such job, or not any more")
    return job


Asked = Annotated[jobs.Job, Depends(_job_of)]


def create_app(
    models: Models, *, token: str | None = None, most_waiting: int = 16, port: int = 7860
) -> FastAPI:
    """The app, whose thread for painting runs as long as the app does.

    Args:
      models: to paint with.
      token: that every request needs; None for none.
      most_waiting: jobs that wait for the one at work.
      port: that it listens on, which names its cookie.
    """
    queue = jobs.Queue(lambda job: work.paint(models, job), most_waiting)

    @contextlib.asynccontextmanager
    async def painting(app: FastAPI) -> AsyncIterator[None]:
        queue.start()
        yield
        await asyncio.to_thread(queue.close)

    app = FastAPI(
        title="Query-Kontext", version="1", description="Paints with trained models.",
        docs_url=None, redoc_url=None, lifespan=painting,
    )  # fmt: skip
    app.state.queue = queue
    _add_painting(app, models, queue)
    _add_jobs(app, queue)
    _add_pages(app)
    _add_errors(app)
    app.add_middleware(guard.Guard, token=token, port=port)
    return app


def _add_painting(app: FastAPI, models: Models, queue: jobs.Queue) -> None:
    """What asks for pictures, and what can be asked for."""

    @app.get("/api/models", summary="Models, defaults and bounds")
    def get_models() -> forms.AppView:
        return forms.AppView(
            models=[
                forms.ModelView(
                    name=model.name,
                    ema=model.has_average,
                    sizes=[sizes.format_size(size) for size in model.limits.sizes],
                    max_area=model.limits.max_area,
                    max_references=model.limits.max_references,
                    max_pixels=model.limits.max_pixels or MAX_PIXELS,
                )
                for model in models.all()
            ],
            settings=forms.Settings(),
            solvers=list(sampler.SOLVERS),
            max_bytes=guard.MAX_BYTES,
            max_pictures=forms.MOST_PICTURES,
            max_waiting=queue.most,
        )

    @app.post("/api/paint", status_code=202, responses=REFUSALS | FULL, summary="Paint")
    def paint(form: forms.PaintForm, response: Response) -> forms.JobView:
        queue.check_room()
        job = intake.job_of(form, models)
        queue.put(job)
        response.headers["Location"] = f"/api/jobs/{job.id}"
        return forms.view_of(job, queue.ahead(job))

    @app.post("/api/lines", responses=REFUSALS, summary="Read a file of prompts")
    def read_lines(form: forms.LinesForm) -> list[forms.LineView]:
        return intake.lines_of(form)


def _add_jobs(app: FastAPI, queue: jobs.Queue) -> None:
    """What follows a job."""

    @app.get("/api/jobs", summary="All jobs, oldest first")
    def get_jobs() -> list[forms.JobView]:
        return [forms.view_of(job, queue.ahead(job)) for job in queue.jobs()]

    @app.get(
        "/api/jobs/{job_id}", response_model=forms.JobView, responses=UNKNOWN,
        summary="How far a job is", description="How far a job is." + EVENTS,
    )  # fmt: skip
    async def get_job(job: Asked, request: Request) -> Any:
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(_events(job, queue), media_type="text/event-stream")
        return forms.view_of(job, queue.ahead(job))

    @app.delete("/api/jobs/{job_id}", responses=UNKNOWN, summary="Cancel a job")
    def cancel(job: Asked) -> forms.JobView:
        queue.cancel(job)
        return forms.view_of(job, 0)

    @app.get(
        "/api/jobs/{job_id}/pictures/{number}.png", responses=UNKNOWN, response_class=Response,
        summary="A painted picture, with its settings as text chunks",
    )  # fmt: skip
    def get_picture(job: Asked, number: int) -> Response:
        png = job.seen().pictures.get(number)
        if png is None:
            raise HTTPException(404, "there is no such picture, or not yet")
        name = f"seed-{job.order.requests[0].seed}-{number}.png"
        told = {"Content-Disposition": f'inline; filename="{name}"'}
        return Response(png, media_type="image/png", headers=told)


async def _events(job: jobs.Job, queue: jobs.Queue) -> AsyncIterator[str]:
    """The changes of a job until it is over; of changes in QUICK succession the last."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    told: tuple[int, int] | None = None
    stop = job.listen(wake)
    try:
        while True:
            changed.clear()
            now = job.seen()
            if now.preview is not None and now.preview[:2] != told:
                index, step, picture = now.preview
                told = index, step
                data = f"data:image/webp;base64,{base64.b64encode(picture).decode()}"
                yield _event("preview", {"index": index, "step": step, "picture": data})
            view = forms.view_of(job, queue.ahead(job))
            yield _event("state", jsonable_encoder(view))
            if view.state in jobs.ENDED:
                return
            await asyncio.sleep(QUICK)
            try:
                await asyncio.wait_for(changed.wait(), STILL_HERE)
            except TimeoutError:
                yield ": still here\n\n"
    finally:
        stop()


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _add_pages(app: FastAPI) -> None:
    """The pages and their files, which are read once: no path is made of what a client asks for."""
    paths = [*(ASSETS / "app").iterdir(), ASSETS / "pages" / "shared.css"]
    known = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in paths}

    def file(name: str) -> Response:
        if name not in known:
            raise HTTPException(404, "there is no such page")
        return Response(known[name][0], media_type=known[name][1])

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return file("index.html")

    @app.get("/docs", include_in_schema=False)
    def docs() -> Response:
        return file("docs.html")

    @app.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        return file(name)


def _add_errors(app: FastAPI) -> None:
    """Every error is JSON with one line."""

    def answer(status: int, text: str, **headers: str) -> JSONResponse:
        return JSONResponse({"error": " ".join(text.split())}, status, headers)

    @app.exception_handler(InputError)
    async def on_input(request: Request, error: InputError) -> JSONResponse:
        return answer(422, str(error))

    @app.exception_handler(jobs.FullError)
    async def on_full(request: Request, error: jobs.FullError) -> JSONResponse:
        return answer(429, str(error), **{"Retry-After": "5"})

    @app.exception_handler(StarletteError)
    async def on_http(request: Request, error: StarletteError) -> JSONResponse:
        return answer(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_form(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return answer(422, f"{name}: {first['msg']}; /docs lists the fields")

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "the app failed at this; its terminal says more")
