"""The tables of predicted step times: for GPUs that are not here, and beside measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxfast.adapters.presets import preset_targets
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.plan import predict
from fluxfast.memory.rates import told, with_measured
from fluxfast.memory.sizes import FluxSizes, Storage, Workload
from fluxfast.memory.stream import DEFAULT_SLOTS
from fluxfast.model.apply import Choices
from fluxfast_bench.counted.floor import Route
from fluxfast_bench.report import measured_rates
from fluxfast_bench.report.markdown import made_by, markdown_table
from fluxfast_bench.report.results import Result, newest_cases
from fluxfast_bench.shapes import SHAPES, Shape
from fluxfast_bench.step.contestants import TARGETS

# seconds a step in SimpleTuner's quickstart for FLUX.1, by GPU, format and shape
QUICKSTART = {("RTX 4090", "nf4"): {"512px-b1": 1.4, "1024px-b1": 3.5}}
# how a step is predicted: its name in the records, and in tables
MODES = {
    "full": "checkpointed",
    "none": "nothing recomputed",
    "tread": "checkpointed, TREAD 0.5",
    "auto": "`vram_budget` auto",
}


def workload_of(
    shape: Shape,
    format: str | None,
    *,
    compute: str = "same",
    rank: int = 16,
    adapter_itemsize: int = 4,
    route: Route | None = None,
) -> Workload:
    """A step of the reference workload: AdamW in 8 bits, a LoRA on every linear of the blocks."""
    sizes = FluxSizes.from_config(shape.config)
    image = [shape.img] * sizes.blocks
    if route is not None:
        inside = range(route.outside, sizes.blocks - route.outside)
        for index in inside:
            image[index] = int(shape.img * (1 - route.ratio))
    return Workload(
        sizes=sizes,
        tokens=tuple(tokens + shape.txt for tokens in image),
        text_tokens=shape.txt,
        batch=shape.batch,
        storage=Storage(format),
        targets=preset_targets(TARGETS),
        rank=rank,
        adapter_itemsize=adapter_itemsize,
        optimizer="adamw8bit",
        compute=compute,
    )


def of_record(record: dict[str, Any], gpu: Gpu) -> float | None:
    """Seconds that the model predicts for a contestant's step; None where it knows none such.

    That is a peer, and one whose products an engine takes that is not the table's.
    """
    from fluxfast_bench.step.worker import CONTESTANTS

    contestant = CONTESTANTS.get(record["contestant"].partition(":")[0])
    if contestant is None or not contestant.ours or contestant.engine is not None:
        return None
    compute = "same" if contestant.compute == "float" else contestant.compute
    workload = workload_of(
        SHAPES[record["case"]],
        None if contestant.storage == "bf16" else contestant.storage,
        compute=compute,
        rank=record["rank"],
        # the bench's adapters are in the activations' type
        adapter_itemsize=2,
        route=contestant.route,
    )
    choices = Choices(
        (record["recompute"],) * workload.sizes.blocks,
        slots=DEFAULT_SLOTS if contestant.streamed else 0,
        use_stream=contestant.streamed,
        host_inputs=contestant.streamed,
        modulation_ahead=contestant.looks_ahead,
        compute=compute,
        graphs=contestant.graphs,
    )
    return predict(workload, choices, gpu).total


def comparison(stored: Sequence[Result]) -> list[dict[str, Any]]:
    """Each step of ours that a GPU of the table has measured beside what is predicted for it.

    "predicted" is from the package's rates, "calibrated" with those that this GPU's results give.
    """
    rows = []
    for result, case, records in newest_cases(stored, "step"):
        of_device = [other for other in stored if other.device == result.device]
        try:
            gpu = measured_rates.gpu_of(of_device)
        except ValueError:
            # a CPU, or a GPU of which no peaks are known
            continue
        calibrated = with_measured(gpu, measured_rates.measured(of_device, gpu))
        for record in records:
            if "reason" in record or (seconds := of_record(record, gpu)) is None:
                continue
            rows.append(
                {
                    "device": result.device,
                    "case": case,
                    "contestant": record["contestant"],
                    "seconds": record["seconds"],
                    "predicted": seconds,
                    "calibrated": of_record(record, calibrated),
                    "rates": told(gpu),
                    "measured_rates": told(calibrated),
                }
            )
    return rows


def comparison_section(stored: Sequence[Result]) -> str:
    """Prediction against measurement, GPU by GPU."""
    parts = []
    rows = comparison(stored)
    head = [
        "case",
        "contestant",
        "measured ms",
        "predicted",
        "ratio",
        "by this GPU's rates",
        "ratio",
    ]
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        cells = [
            [
                row["case"],
                row["contestant"],
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['predicted'] * 1e3:.1f}",
                f"{row['predicted'] / row['seconds']:.2f}",
                f"{row['calibrated'] * 1e3:.1f}",
                f"{row['calibrated'] / row['seconds']:.2f}",
            ]
            for row in own
        ]
        said = f"{device}: predicted {own[0]['rates']}, and {own[0]['measured_rates']}."
        parts.append(f"{said}\n\n{markdown_table(head, cells, left=2)}")
    return "\n\n".join(parts)


def predictions(data: dict[str, Any]) -> str:
    """The stored predictions of `fluxfast-bench predict`, a row for each GPU and format."""
    records = data["records"]
    shapes = list(dict.fromkeys(record["case"] for record in records))
    columns = [(shape, mode) for shape in shapes for mode in ("full", "none", "auto")]
    found = {(r["gpu"], r["format"], r["case"], r["mode"]): r for r in records}
    rows = [
        [gpu, format, *(_cell(found.get((gpu, format, *column))) for column in columns)]
        for gpu, format in dict.fromkeys((r["gpu"], r["format"]) for r in records)
    ]
    head = ["", "base", *(f"{shape}, {MODES[mode]}" for shape, mode in columns)]
    rates = "; ".join(f"{names} {said}" for said, names in _by_rates(records).items())
    return f"{made_by(data['run'])}\n\n{rates}.\n\n{markdown_table(head, rows, left=2)}"


def _by_rates(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What is said of the rates, and of which GPUs it is said."""
    said: dict[str, list[str]] = {}
    for gpu, rates in dict.fromkeys((r["gpu"], r["rates"]) for r in records):
        said.setdefault(rates, []).append(gpu)
    return {rates: ", ".join(names) for rates, names in said.items()}


def seconds_told(record: dict[str, Any]) -> str:
    """A prediction's seconds, with an s where blocks are streamed; a dash where it does not fit."""
    if record["seconds"] is None:
        return "-"
    return f"{record['seconds']:.2f}{' s' if record['streamed'] else ''}"


def _cell(record: dict[str, Any] | None) -> str:
    """The same, with the quickstart's seconds in brackets."""
    if record is None:
        return ""
    quickstart = record["quickstart"]
    return seconds_told(record) + ("" if quickstart is None else f" ({quickstart:g})")
