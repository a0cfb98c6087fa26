"""A run's report: one HTML page of what is in the run's folder, which needs no network to be read.

Everything in it comes from files: `run.json`, `metrics.jsonl`, `events.jsonl`, the newest
checkpoint's `training_state.json` and the validation images. What is missing or damaged is named in
the page, and the rest is shown.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fluxfast.config.public import without_secrets
from fluxfast.config.run import TrainConfig
from fluxfast.files import write_atomic
from fluxfast.train import state
from fluxfast.train.events import EVALUATIONS_NAME, METRICS_NAME, read_evaluations, read_metrics
from fluxfast.train.grid import evenly
from fluxfast.train.image_files import FOLDER, DrawnImage, drawn_images
from fluxfast.train.loss_chart import held_out_curves
from fluxfast.train.run_events import EVENTS_NAME, RUN_FAILED, read_events
from fluxfast.train.run_lock import holder
from fluxfast.train.run_record import RECORD_NAME, RunRecord, read_run_record
from fluxfast.train.svg_chart import Series, line_chart, running_mean

REPORT_NAME = "report.html"
# columns of the grid beside the base's, and the longest edge of an image in it, in pixels
_MOST_STEPS = 6
_IMAGE_EDGE = 320
# what a run announces first
_FIRST_STAGE = "init_data_backend"
# what names of the scores begin with that an evaluation gives beside losses
_CLIP = "clip/"


def write_report(output_dir: Path) -> Path:
    """Write `report.html` into a run's folder; returns its path.

    Raises ValueError where the folder holds nothing of a run, OSError where it can't be written.
    """
    page = report_page(output_dir)
    path = output_dir / REPORT_NAME
    write_atomic(path, page.encode())
    return path


def report_page(output_dir: Path) -> str:
    """The page's text."""
    missing: list[str] = []
    record = read_run_record(output_dir)
    if not record.config:
        missing.append(f"{RECORD_NAME}: datasets, versions and most of the config")
    metrics = _read(METRICS_NAME, output_dir, lambda path: read_metrics(path, missing.append))
    evaluations = _read(
        EVALUATIONS_NAME, output_dir, lambda path: read_evaluations(path, missing.append)
    )
    events = _read(EVENTS_NAME, output_dir, read_events)
    for name, found, what in (
        (METRICS_NAME, metrics, "losses, learning rate, memory and times of the steps"),
        (EVENTS_NAME, events, "how the run went"),
    ):
        if not found:
            missing.append(f"{name}: {what}")
    saved = _newest_state(output_dir, missing)
    config = record.config or _options(saved)
    at = str(config.get("validation_stitch_input_location"))
    drawn = drawn_images(output_dir / FOLDER, at)
    if not (config or metrics or events or drawn):
        raise ValueError(
            f"{output_dir}: holds nothing of a run ({RECORD_NAME}, {METRICS_NAME}, {EVENTS_NAME}, "
            f"checkpoint-*, {FOLDER}); name the run's output_dir"
        )
    steps = record.steps or int(_number(saved.get("settings", {}), "steps") or 0)
    reached = max([saved.get("global_step", 0), *(line["step"] for line in metrics[-1:])])
    changed = [name for name in record.changed if name in config]
    return _template().render(
        title=str(config.get("tracker_run_name") or output_dir.resolve().name),
        state=_state(output_dir, events, finished=bool(steps) and reached >= steps),
        reached=reached,
        steps=steps,
        times=_times(record, events, metrics),
        troubles=[_told(each) for each in events if each["type"] == "error"],
        missing=missing,
        changed={name: _shown(config[name]) for name in changed},
        others={name: _shown(config[name]) for name in sorted(config) if name not in changed},
        charts=_charts(metrics, evaluations),
        grid=_grid(drawn, record),
        datasets=record.datasets,
        versions=record.versions,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _template() -> Template:
    text = importlib.resources.files("fluxfast.train").joinpath("report.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(text)


def _read(
    name: str, output_dir: Path, reader: Callable[[Path], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    try:
        return reader(output_dir / name)
    # an absent file is as good as an empty one
    except OSError:
        return []


def _newest_state(output_dir: Path, missing: list[str]) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of the run; {} without one."""
    for folder in reversed(state.checkpoints(output_dir)):
        try:
            found = json.loads((folder / state.STATE_NAME).read_bytes())
            return {
                "global_step": int(found["global_step"]),
                "settings": dict(found.get("settings") or {}),
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            missing.append(f"{folder.name}/{state.STATE_NAME}: it can't be read")
    return {}


def _options(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a checkpoint has kept, without what it keeps beside them."""
    settings = without_secrets(saved.get("settings", {}))
    return {name: value for name, value in settings.items() if name in TrainConfig.model_fields}


def _state(
    output_dir: Path, events: Sequence[Mapping[str, Any]], *, finished: bool
) -> dict[str, str]:
    """How the run stands: a word, and what there is to say of it.

    finished: whether it has come to its last step, for a run whose events are lost.
    """
    last = list(_since_last_start(events))
    ended = {_stage(each) for each in last}
    failures = [each for each in last if each.get("title") == RUN_FAILED]
    if ("training_complete", "completed") in ended:
        return {"word": "complete", "detail": ""}
    if failures:
        return {"word": "failed", "detail": str(failures[-1].get("message", ""))}
    if ("training_abort", "completed") in ended:
        return {"word": "stopped", "detail": "The same command goes on from the last checkpoint."}
    try:
        if holder(output_dir) is not None:
            return {"word": "running", "detail": ""}
    # a folder that can only be read can't be asked
    except OSError:
        pass
    if finished:
        return {"word": "complete", "detail": ""}
    return {"word": "interrupted", "detail": "It has not ended, and nobody works in the folder."}


def _since_last_start(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The events since the run was started or resumed last."""
    starts = [i for i, each in enumerate(events) if _stage(each) == (_FIRST_STAGE, "running")]
    return events[starts[-1] :] if starts else events


def _stage(event: Mapping[str, Any]) -> tuple[str, str]:
    """(key, status) of an event that has a stage."""
    stage = event.get("stage")
    stage = stage if isinstance(stage, dict) else {}
    return str(stage.get("key")), str(stage.get("status"))


def _told(error: Mapping[str, Any]) -> str:
    return f"{_moment(error.get('timestamp'))}: {error.get('title')}: {error.get('message')}"


def _times(
    record: RunRecord,
    events: Sequence[Mapping[str, Any]],
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    times = {}
    for start in record.starts:
        what = f"resumed at step {start.step}" if start.step else "started"
        times[what] = _moment(start.time)
    if events:
        times["last event"] = _moment(events[-1].get("timestamp"))
    paces = [value for line in metrics if (value := _number(line, "steps_per_second"))]
    if paces:
        times["time in steps"] = _duration(sum(1 / pace for pace in paces))
        times["a step, at the end"] = f"{1 / paces[-1]:.3g} s"
    return times


def _moment(time: Any) -> str:
    """A time, which an event has in ISO's form, as people read it."""
    try:
        return f"{datetime.fromisoformat(str(time)):%Y-%m-%d %H:%M:%S %Z}".rstrip()
    except ValueError:
        return str(time)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


# ---- charts


def _charts(
    metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> list[dict[str, str]]:
    """The charts that there are numbers for: title and SVG."""
    held = _points(metrics, "regularisation_loss")
    trained = [line for line in metrics if "regularisation_loss" not in line] or metrics
    losses = _points(trained, "loss")
    window = max(1, len(losses) // 25)
    scores = sorted({key for line in evaluations for key in line if key.startswith(_CLIP)})
    paces = _points(metrics, "steps_per_second")
    charts = {
        "Training loss": ("loss", [
            Series("each step", losses, dots=True),
            Series(f"mean of {window} steps", running_mean(losses, window)),
            Series("regularisation", running_mean(held, window)),
        ]),
        "Evaluation loss": ("loss", [
            Series(name, curve) for name, curve in held_out_curves(evaluations).items()
        ]),
        "CLIP score": ("100 x cosine", [
            Series(key.removeprefix(_CLIP), _points(evaluations, key))
            for key in scores if not key.endswith("std")
        ]),
        "Learning rate": ("learning rate", [
            Series("learning rate", _points(metrics, "learning_rate"))
        ]),
        "Peak memory": ("GiB", [Series("peak so far", _points(metrics, "memory_gib"))]),
        "Time of a step": ("seconds", [
            Series("mean of the last steps", [(x, 1 / pace) for x, pace in paces if pace > 0])
        ]),
    }  # fmt: skip
    drawn = {
        title: line_chart(f"chart-{number}", title, series, x="step", y=unit)
        for number, (title, (unit, series)) in enumerate(charts.items())
    }
    return [{"title": title, "svg": Markup(svg)} for title, svg in drawn.items() if svg]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], value) for line in lines if (value := _number(line, key)) is not None]


def _number(line: Mapping[str, Any], key: str) -> float | None:
    """A line's finite number; None for anything else that a damaged file may hold."""
    value = line.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None


# ---- validation images


def _grid(drawn: Sequence[DrawnImage], record: RunRecord) -> dict[str, Any]:
    """A row for each prompt, size and index, a column for each step; the base's step 0 is first."""
    steps = sorted({image.step for image in drawn})
    trained = [step for step in steps if step > 0]
    columns = [*(step for step in steps if step == 0), *evenly(trained, _MOST_STEPS)]
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for image in drawn:
        row = rows.setdefault((image.nickname, image.size, image.index), {})
        if image.step in columns:
            row[image.step] = _inlined(image)
    shown = []
    for (name, size, index), row in rows.items():
        prompt = record.prompt_of(name)
        # the base is drawn once, whatever weights are drawn with later
        base = rows.get((prompt.file, size, index), {}) if prompt else {}
        shown.append({
            "name": name,
            "prompt": prompt.prompt if prompt else "",
            "size": f"{size[0]}x{size[1]}",
            "images": [row.get(step, base.get(0) if step == 0 else None) for step in columns],
        })  # fmt: skip
    return {"columns": columns, "left_out": len(steps) - len(columns), "rows": shown}


def _inlined(image: DrawnImage) -> str:
    """A small copy as an address that holds the image itself; "" where the file is damaged."""
    try:
        small = image.open()
    except (OSError, ValueError, SyntaxError):
        return ""
    small.thumbnail((_IMAGE_EDGE, _IMAGE_EDGE))
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
