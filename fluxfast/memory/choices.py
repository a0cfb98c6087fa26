"""The one place where fluxfast chooses for its user: `choose`.

The trainer, `fluxfast-train plan` and `accelerate` all call it. `Wishes` is what the user said,
`Facts` is what is known of the machine, the model and the data. Both are plain data, so choices can
be made for a GPU that is not there. Every choice comes with its reason, which the run's log, the
plan's report and `accelerate`'s report show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxfast.config import attention
from fluxfast.config.precision_words import in_words
from fluxfast.memory.budget import budget_bytes, reserve_gib, usable_bytes
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.plan import GIB, account, fit, predict, why_nothing_fits
from fluxfast.memory.rates import Rate
from fluxfast.memory.sizes import Workload
from fluxfast.memory.stream import DEFAULT_SLOTS
from fluxfast.memory.wishes import Wishes
from fluxfast.model import graphs
from fluxfast.model.apply import Choices
from fluxfast.model.compiled import missing
from fluxfast.ops import attention_sage, verdicts
from fluxfast.ops.attention import checked_as
from fluxfast.quant import FORMATS
from fluxfast_kernels.launch import reads_transposed

# A transposed copy of the base's codes may bring a step to this part of the VRAM, or take this part
# where nobody knows what a step takes: CUDA graphs keep memory that no plan counts.
ROOM, ROOM_UNKNOWN = 0.8, 0.25
# modulation ahead must be done in this part of a step's predicted time, which may be off by as much
# as is left of it: computed on the GPU it costs no more than reading its weights
EARLY = 0.75
# with fewer cores, the thread that launches kernels has none for itself
CORES_FOR_BOTH = 2
AS_ASKED = "as asked"


@dataclass(frozen=True)
class Facts:
    """What is known of the machine, the model and the data.

    Attributes:
        blocks: how many the model has.
        format: the format that the blocks' weights are stored in; None: they are not quantised, or
            in no format of ours.
        gpu: None for a CPU.
        workload: a step on the largest batch; None where nobody knows it, and then neither a budget
            nor modulation ahead can be chosen.
        smallest: a step on the smallest batch.
        free: bytes of VRAM that the run may have; None: all of the GPU's but the driver's.
        codes: bytes of codes that the base is stored as, where there is no workload that says so.
        host_seconds: what the CPU takes for a batch's modulation, and whether that is measured;
            None: it is not known yet, and taken to be less than a step.
        cores: that this process may use; None: enough.
        obstacles: what of a model that is there forbids "modulation_ahead" or "graphs", and why.
    """

    blocks: int
    format: str | None
    gpu: Gpu | None
    workload: Workload | None = None
    smallest: Workload | None = None
    free: int | None = None
    codes: int = 0
    host_seconds: Rate | None = None
    cores: int | None = None
    obstacles: Mapping[str, str | None] = field(default_factory=dict)


class Refused(ValueError):
    """What was asked for can't be had; `problems` has a line for each order."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class OverBudget(Refused):
    """No choices need as little VRAM as the budget; `lines` say which settings would help."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(*(f'"vram_budget": {line}' for line in lines))
        self.lines = lines


def choose(wishes: Wishes, facts: Facts) -> Choices:
    """Every choice, with its reason.

    "auto" passes over what the machine lacks, what failed its check on it (`ops.verdicts`), and
    what would be slower. Raises Refused where an order can't be followed, and OverBudget where
    nothing fits the budget.
    """
    if problems := refusals(wishes, facts.gpu):
        raise Refused(*problems)
    compute, compute_reason = choose_compute(wishes, facts.format, facts.gpu)
    workload = None if facts.workload is None else replace(facts.workload, compute=compute)
    ahead, ahead_reason = _modulation_ahead(wishes, facts)
    choices, memory_reasons = _memory(wishes, facts, workload, ahead)
    graphed, graphs_reason = _graphs(wishes, facts, choices)
    choices = replace(choices, graphs=graphed)
    if ahead and (late := _host_is_late(wishes, facts, workload, choices)) is not None:
        choices, ahead_reason = replace(choices, modulation_ahead=False), late
    transposed, transposed_reason = _transposed_codes(wishes, facts, compute, workload, choices)
    backend, attention_reason = _attention(wishes, facts)
    compiled_reason = _compiled(wishes, choices)
    return replace(
        choices,
        compute=compute,
        outliers=wishes.outliers,
        transposed_codes=transposed,
        attention=backend,
        compile=wishes.compile,
        deterministic=wishes.deterministic and facts.gpu is not None,
        reasons={
            "compute": compute_reason,
            **memory_reasons,
            "transposed_codes": transposed_reason,
            "modulation_ahead": ahead_reason,
            "graphs": graphs_reason,
            "attention": attention_reason,
            "compile": compiled_reason,
        },
    )


def refusals(wishes: Wishes, gpu: Gpu | None) -> list[str]:
    """A line for each order that this machine can't follow, whatever the run computes."""
    found = []
    ordered = wishes.compute not in ("auto", "same")
    if ordered and (obstacle := compute_obstacle(wishes.compute, gpu)) is not None:
        found.append(
            _refusal("compute_precision", in_words(wishes.compute), obstacle, '"auto" or "same"')
        )
    if wishes.cuda_graphs is True and (obstacle := _no_graphs(gpu)) is not None:
        found.append(_refusal("cuda_graphs", "true", obstacle, '"auto" or false'))
    if wishes.streams and (obstacle := _no_streaming()) is not None:
        found.append(_refusal("enable_group_offload", "true", obstacle, "false"))
    how = wishes.compile or wishes.draws_compiled
    if how is not None and how.has_graphs and gpu is not None:
        obstacle = "its CUDA graphs are of single regions, which overwrite each other's results"
        instead = '"default" or "max-autotune-no-cudagraphs" ("cuda_graphs" replays whole steps)'
        found.append(_refusal("dynamo_mode", how.mode, obstacle, instead))
    arch = None if gpu is None else gpu.arch
    if (obstacle := attention.obstacle(wishes.mechanism, arch)) is not None:
        found.append(_refusal("attention_mechanism", wishes.mechanism, obstacle, '"diffusers"'))
    elif (verdict := _attention_verdict(wishes.mechanism, gpu)) is not None:
        found.append(_refusal("attention_mechanism", wishes.mechanism, verdict, '"diffusers"'))
    elif wishes.deterministic and gpu is not None and not _is_deterministic(wishes.mechanism):
        obstacle = '"deterministic" is true, and its backward adds up in no fixed order'
        found.append(_refusal("attention_mechanism", wishes.mechanism, obstacle, '"native-flash"'))
    return found


def lacking(wishes: Wishes, device_type: str) -> list[str]:
    """A line for each order that this machine's software can't follow."""
    found = []
    drawing = attention.MECHANISMS[wishes.mechanism].drawing
    if drawing is not None and (lacks := attention_sage.missing(drawing)) is not None:
        found.append(_refusal("attention_mechanism", wishes.mechanism, lacks, '"diffusers"'))
    for option, how, off in (
        ("dynamo_backend", wishes.compile, '"no"'),
        ("validation_torch_compile", wishes.draws_compiled, "false"),
    ):
        if how is not None and (lacks := missing(how, device_type)) is not None:
            found.append(_refusal(option, how.backend if off == '"no"' else "true", lacks, off))
    return found


def _refusal(option: str, value: str, obstacle: str, instead: str) -> str:
    """The line for an order that can't be followed."""
    return f'"{option}" is {value}, but {obstacle}: set it to {instead}'


# what products run in


def compute_obstacle(compute: str, gpu: Gpu | None) -> str | None:
    """Why products can't run in "int8" or "e4m3" here; None where they can.

    On a CPU 8-bit products are emulated, so whoever asks for them gets them.
    """
    if gpu is not None and not gpu.rate(compute):
        return f"{gpu.name} has no tensor cores for {in_words(compute)}"
    return verdicts.failed(verdicts.COMPUTE, compute)


def choose_compute(wishes: Wishes, format: str | None, gpu: Gpu | None) -> tuple[str, str]:
    """(what products run in, why), for a base in that format.

    "auto" takes 8 bits for a base that is stored in few bits already, where they are faster: e4m3
    for weights in fp8, else int8. An order is taken as it is; `refusals` has looked at it.
    """
    if wishes.compute != "auto":
        return wishes.compute, AS_ASKED
    if format not in wishes.eight_bit_bases:
        every = wishes.eight_bit_bases == tuple(FORMATS)
        stored = "quantised" if every else f"stored in {' or '.join(wishes.eight_bit_bases)}"
        return "same", f"the base is not {stored}"
    if gpu is None or wishes.impl in ("native", "ref"):
        where = "on a CPU" if gpu is None else f"in the {wishes.impl} kernels"
        return "same", f"8-bit products are no faster {where}"
    compute = "e4m3" if format == "fp8_e4m3" else "int8"
    if (obstacle := compute_obstacle(compute, gpu)) is not None:
        return "same", f"not in {in_words(compute)}: {obstacle}"
    return compute, (
        f"the base is stored in {in_words(str(format))}, and this GPU has tensor cores for "
        f"{in_words(compute)}; "
        'activations are rounded to 8 bits ("same" turns it off)'
    )


# what is recomputed, and where the weights are


def _memory(
    wishes: Wishes, facts: Facts, workload: Workload | None, ahead: bool
) -> tuple[Choices, dict[str, str]]:
    """Recomputation and streaming: as the user says, or what fits the budget on a GPU."""
    if wishes.vram_budget is None or facts.gpu is None or workload is None:
        return _as_said(wishes, facts, ahead)
    budget = budget_bytes(wishes, facts.gpu, facts.free)
    choices = fit(workload, facts.gpu, budget, modulation_ahead=ahead)
    if choices is None:
        raise OverBudget(why_nothing_fits(workload, budget, modulation_ahead=ahead))
    needed = account(workload, choices).needed
    left = ""
    if wishes.vram_budget == "auto":
        left = f" ({reserve_gib(facts.gpu, wishes.vram_reserve):g} left free)"
    reason = (
        f"vram_budget {budget / GIB:.2f} GiB{left}: a step should take {needed / GIB:.2f} and be "
        "the fastest that fits"
    )
    return choices, {"recompute": reason, "streaming": "by the same budget"}


def _as_said(wishes: Wishes, facts: Facts, ahead: bool) -> tuple[Choices, dict[str, str]]:
    """The choices about memory as the user says them."""
    every = wishes.checkpoint_every
    if wishes.recompute is not None:
        one_for_all = isinstance(wishes.recompute, str)
        policies: Any = (wishes.recompute,) * facts.blocks if one_for_all else wishes.recompute
        reason = AS_ASKED
    elif every is None:
        policies, reason = (), "as the checkpointing around the blocks asks"
    else:
        checkpointed = [every > 0 and index % every == 0 for index in range(facts.blocks)]
        policies = tuple("full" if full else "none" for full in checkpointed)
        reason = f"gradient checkpointing of {f'one block in {every}' if every else 'no block'}"
    choices = Choices(
        policies,
        slots=DEFAULT_SLOTS if wishes.streams else 0,
        blocks_per_group=wishes.blocks_per_group if wishes.streams else 1,
        use_stream=wishes.streams and wishes.use_stream,
        # beside the computation their way out and back costs nothing; in line with it, it would
        host_inputs=wishes.streams and wishes.use_stream and facts.gpu is not None,
        modulation_ahead=ahead,
    )
    streaming = AS_ASKED if wishes.streams else "nobody asks for it"
    return choices, {"recompute": reason, "streaming": streaming}


def _no_streaming() -> str | None:
    """Why blocks can't be streamed on this machine; None where they can."""
    return verdicts.failed(verdicts.STREAMING, verdicts.ONLY_WAY)


def _transposed_codes(
    wishes: Wishes, facts: Facts, compute: str, workload: Workload | None, choices: Choices
) -> tuple[bool, str]:
    """Whether the base's codes have a transposed copy for dgrad, and why."""
    if compute == "same":
        return False, "products run on values"
    if facts.format is None or FORMATS[facts.format].stored_codes != compute:
        return False, "the codes that products read are made in each step, in either order"
    if facts.gpu is None or not reads_transposed(facts.gpu.arch):
        return False, "products on this device read codes in the order that they are stored in"
    if choices.streams:
        return False, "blocks are streamed, and a copy would double what is copied"
    if workload is not None and wishes.vram_budget is not None:
        return choices.transposed_codes, "by the same budget"
    room = budget_bytes(wishes, facts.gpu, facts.free)
    if workload is None:
        taken, part = facts.codes, ROOM_UNKNOWN
    else:
        taken, part = account(workload, replace(choices, transposed_codes=True)).needed, ROOM
    what = "the copy" if workload is None else "a step with the copy"
    fits = taken <= part * room
    reason = (
        f"{what} takes {taken / GIB:.2f} GiB, {'at most' if fits else 'more than'} {part:.0%} of "
        f"{room / GIB:.2f} GiB"
    )
    return fits, f"dgrad reads it on this GPU, and {reason}" if fits else reason


# modulation


def _modulation_ahead(wishes: Wishes, facts: Facts) -> tuple[bool, str]:
    """Whether modulation may be computed ahead, on the CPU, and why."""
    if wishes.modulation_ahead is False:
        return False, AS_ASKED
    if wishes.modulation_ahead == "auto" and facts.gpu is None:
        return False, "on a CPU it would save neither memory nor time"
    trained = None if facts.workload is None else facts.workload.trained_modulation
    obstacle = facts.obstacles.get("modulation_ahead")
    if trained is not None:
        who = "the run" if facts.workload and facts.workload.trains_all else "the LoRA"
        obstacle = f"{who} trains it ({trained})"
    if obstacle is None:
        saved = "its weights stay in host memory, and the CPU is done before the step needs it"
        return True, saved if wishes.modulation_ahead == "auto" else AS_ASKED
    if wishes.modulation_ahead is True:
        obstacle = f"modulation is not constant: {obstacle}"
        raise Refused(_refusal("modulation_ahead", "true", obstacle, '"auto"'))
    return False, obstacle


def _host_is_late(
    wishes: Wishes, facts: Facts, workload: Workload | None, choices: Choices
) -> str | None:
    """Why the GPU might wait for modulation although it has room to compute it itself; else None.

    What a step takes is predicted, for the smallest images, with a graph or without. A budget or
    streamed blocks want the weights on the host in any case.
    """
    if wishes.modulation_ahead != "auto" or wishes.vram_budget is not None or choices.streams:
        return None
    if facts.host_seconds is None or facts.gpu is None or workload is None:
        return None
    in_place = replace(choices, modulation_ahead=False)
    if account(workload, in_place).needed > usable_bytes(facts.gpu, wishes.vram_reserve):
        return None
    smallest = replace(facts.smallest or workload, compute=workload.compute)
    step = predict(smallest, choices, facts.gpu)
    taken, measured, source = facts.host_seconds
    told = "takes" if measured else "should take"
    reason = f"the CPU {told} {taken * 1000:.0f} ms for it"
    reason += "" if measured else f" ({source})"
    if step.host and facts.cores is not None and facts.cores < CORES_FOR_BOTH:
        taken += step.host
        reason += f" and {step.host * 1000:.0f} to launch a step on the same core"
    if taken <= EARLY * step.total:
        return None
    return f"{reason}, a step's computing should take {step.total * 1000:.0f}"


# CUDA graphs, torch.compile and attention


def _no_graphs(gpu: Gpu | None) -> str | None:
    """Why this machine has no CUDA graphs; None where it has."""
    if gpu is None:
        return "only a GPU has them"
    return verdicts.failed(verdicts.GRAPHS, verdicts.ONLY_WAY)


def _graphs(wishes: Wishes, facts: Facts, choices: Choices) -> tuple[bool, str]:
    """Whether steps are replayed as CUDA graphs, and why."""
    if wishes.cuda_graphs is False:
        return False, AS_ASKED
    obstacle = _no_graphs(facts.gpu)
    if obstacle is None and choices.streams:
        obstacle = graphs.STREAMED
    if wishes.releases_gradients:
        obstacle = "weights are updated within backward"
    if facts.workload is not None and facts.workload.trains_all:
        obstacle = "only fused blocks are captured, and those whose weights train are not"
    obstacle = obstacle or facts.obstacles.get("graphs")
    if wishes.cuda_graphs is True:
        if obstacle is not None:
            raise Refused(_refusal("cuda_graphs", "true", obstacle, '"auto" or false'))
        return True, AS_ASKED
    if obstacle is None and wishes.vram_budget is not None:
        obstacle = (
            '"vram_budget" does not count what they keep ("cuda_graphs": true asks for them all '
            "the same)"
        )
    return obstacle is None, obstacle or "a step is the same launches each time"


def _attention_verdict(mechanism: str, gpu: Gpu | None) -> str | None:
    """What is wrong with a mechanism's back end on this machine; None where nothing is known."""
    row = attention.MECHANISMS[mechanism]
    backend = row.cpu if gpu is None else row.gpu
    return None if backend is None else verdicts.failed(checked_as(False), backend)


def _is_deterministic(mechanism: str) -> bool:
    """Whether a mechanism is, or can be, a back end that gives the same bits each time."""
    return attention.MECHANISMS[mechanism].gpu in ("auto", "flash", "ref")


def _compiled(wishes: Wishes, choices: Choices) -> str:
    """Why torch.compile compiles something, or nothing."""
    if wishes.compile is None:
        return "nobody asks for it"
    if not wishes.compile.blocks:
        return "as asked: what is around the blocks, which is counted as taking no memory"
    if choices.streams:
        obstacle = "blocks are streamed, and compiled ones have their weights in place"
    elif wishes.vram_budget is not None:
        obstacle = '"vram_budget" does not count what compiled blocks keep'
    elif "selective" in choices.recompute:
        obstacle = '"recompute" is selective, and compiled blocks recompute all or nothing'
    else:
        return "as asked: blocks too, whose memory is counted as that of fused ones"
    raise Refused(
        _refusal("dynamo_use_regional_compilation", "true", obstacle, "false")
        + ", which compiles what is around them"
    )


def _attention(wishes: Wishes, facts: Facts) -> tuple[str, str]:
    """Attention's back end, and why."""
    if wishes.attention == "auto":
        mechanism = attention.MECHANISMS[wishes.mechanism]
        asked = mechanism.cpu if facts.gpu is None else mechanism.gpu
        assert asked is not None, "the mechanism was not refused"
        wishes = replace(wishes, attention=asked)
    if wishes.deterministic and facts.gpu is not None and wishes.attention != "ref":
        # the other back ends add gradients up by atomic additions, in no fixed order
        return "flash", "the back end whose backward adds up in the same order each time"
    return wishes.attention, "the fastest back end" if wishes.attention == "auto" else AS_ASKED
