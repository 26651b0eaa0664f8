"""What clients send and get as JSON; the page at /docs shows these texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from qk_jax import painting
from qk_jax.app import jobs

MOST_PICTURES = 16  # of a job
MOST_REFERENCES = 16  # of a form; a model may take fewer
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Settings(painting.Settings):
    """How the sampler paints; docs/sample.md says what each does."""


class Upload(BaseModel):
    """A picture file."""

    model_config = _STRICT
    name: str = Field("", max_length=1000, description="what it is called, in errors and PNGs")
    data: str = Field(description="the file, in base64: AVIF, BMP, GIF, JPEG, PNG, TIFF, WebP ...")


class PaintForm(BaseModel):
    """What to paint."""

    model_config = _STRICT
    prompt: str = Field(description="what to paint, or what to do with the pictures")
    source: Upload | None = Field(None, description="the picture to edit")
    references: Annotated[list[Upload], Field(max_length=MOST_REFERENCES)] = Field(
        [], description="pictures of subjects, in the order in which the prompt means them"
    )
    model: str | None = Field(None, description="of /api/models; the first without one")
    ema: bool = Field(True, description="paint with the moving average of the weights, if any")
    size: str | None = Field(
        None, description="width x height, '64x64'; else the trained size nearest to the source's"
    )
    seed: int = Field(0, description="of the noise, 0 to 4294967295")
    num: int = Field(1, ge=1, le=MOST_PICTURES, description="pictures, each of its own noise")
    preview: int = Field(0, ge=0, description="steps between two previews; 0 for none")
    settings: Settings = Field(default_factory=Settings, description="of the sampler")


class LinesForm(BaseModel):
    """A file of prompts."""

    model_config = _STRICT
    name: str = Field("", max_length=1000, description="what the file is called, in errors")
    text: str = Field(description="a JSON object a line, with prompt and perhaps seed and out")
    seed: int = Field(0, description="of the lines that have none")


class LineView(BaseModel):
    """A line of a file of prompts."""

    prompt: str
    seed: int
    out: str = Field(description="the name that its picture should have")


class ModelView(BaseModel):
    """A model that can paint."""

    name: str
    ema: bool = Field(description="whether there is a moving average of its weights")
    sizes: list[str] = Field(description="width x height of the training's pictures")
    max_area: int = Field(description="pixels of the largest picture that it paints")
    max_references: int
    max_pixels: int = Field(description="of an uploaded picture")


class AppView(BaseModel):
    """The models, the defaults and the bounds of this app."""

    models: list[ModelView]
    settings: Settings = Field(description="the defaults of the sampler")
    solvers: list[str]
    max_bytes: int = Field(description="of a request, pictures in base64 included")
    max_pictures: int = Field(description="of a job")
    max_waiting: int = Field(description="jobs that can wait")


class JobView(BaseModel):
    """How far a job is."""

    id: str
    state: Literal["queued", "loading", "compiling", "painting", "done", "failed", "cancelled"]
    ahead: int = Field(description="jobs that come before it")
    step: int = Field(description="sampler steps of the picture at hand")
    steps: int = Field(description="of a picture")
    num: int = Field(description="pictures that were asked for")
    pictures: list[str] = Field(description="addresses of those that are painted, PNG files")
    seconds: float = Field(description="for how long it has been at work")
    error: str | None = Field(description="why it failed, in one line")
    notes: list[str] = Field(description="what is doubtful, such as unknown characters")
    model: str
    ema: bool
    prompt: str
    seed: int
    size: str


class ErrorView(BaseModel):
    """Why a request was refused."""

    error: str = Field(description="one line that names the thing and the mend")


def view_of(job: jobs.Job, ahead: int) -> JobView:
    """How far a job is, with `ahead` others before it."""
    now, order = job.seen(), job.order
    first = order.requests[0]
    height, width = first.size
    return JobView(
        id=job.id,
        state=now.state,  # type: ignore[arg-type]  # one of the words above
        ahead=ahead,
        step=now.step,
        steps=order.settings.steps,
        num=len(order.requests),
        pictures=[f"/api/jobs/{job.id}/pictures/{index}.png" for index in sorted(now.pictures)],
        seconds=round(now.seconds, 2),
        error=now.error,
        notes=list(job.notes),
        model=order.model.name,
        ema=order.average,
        prompt=first.prompt,
        seed=first.seed,
        size=f"{width}x{height}",
    )
