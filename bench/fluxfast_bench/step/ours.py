"""fluxfast's own contestants: formats, 8-bit products, TREAD, streaming, CUDA graphs, compiled.

`ready` does to a model what a run does, by the functions that the trainer calls.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fluxfast.memory.stream import DEFAULT_SLOTS, stream_blocks
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.compiled import Compile
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops.linear.products_triton import reads_transposed
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from fluxfast_bench.counted.floor import Route
from fluxfast_bench.step.contestants import Contestant, Setup

TREAD = Route(ratio=0.5)
MODES = {
    "tread": "TREAD 0.5",
    "streamed": "streamed",
    "library": "library's wide products",
    "fused": "our own kernel's wide products",
    "device-modulation": "modulation on the device",
    "graphs": "CUDA graphs",
    "one-order": "codes in one order",
    "lokr": "LoKr in LoRA's place",
    "equal-lokr": "LoKr of about as many numbers in LoRA's place",
    "compile": "torch.compile around the blocks",
    "compile-blocks": "torch.compile of the blocks too",
}
# what trains in these modes, in the place of LoRA
ADAPTERS = {"lokr": "LoKr", "equal-lokr": "LoKr, rank-equivalent"}
# a step that should be compiled as a whole, or not at all
COMPILED = {
    "compile": Compile(fullgraph=True),
    "compile-blocks": Compile(fullgraph=True, blocks=True),
}
# against weights as they are stored, so what is left is rounding: of activations, and of weights to
# 8 bits
ERRORS = {"float": 0.04, "int8": 0.08, "e4m3": 0.15}


def ready(
    model: Any,
    *,
    compute: str,
    recompute: str,
    ahead: bool,
    streamed: bool = False,
    graphs: bool = False,
    transposed_codes: bool = False,
    compile: Compile | None = None,
) -> None:
    """Makes a frozen transformer with its adapters what a run's trainer has at its first step.

    It may be on meta tensors. compute: as a contestant has it. ahead: modulation is computed ahead.
    transposed_codes, compile: as in `Choices`.
    """
    choices = Choices(
        (recompute,) * len(model.blocks),
        slots=DEFAULT_SLOTS if streamed else 0,
        modulation_ahead=ahead,
        compute="same" if compute == "float" else compute,
        transposed_codes=transposed_codes,
        compile=compile,
    )
    make_ready(model, choices)
    if streamed:
        # a run whose blocks stream beside the computation has their inputs on the host, too
        stream_blocks(model, model.device, inputs_on_host=True)
    if graphs:
        model.set_cuda_graphs(True)


def _contestant(storage: str, compute: str, *modes: str) -> Contestant:
    """storage: "bf16" or a format. modes: of MODES."""
    # as a run has them, on a GPU with room
    transposes = "one-order" not in modes

    def quantize(module: nn.Module) -> None:
        if storage != "bf16":
            # a part of the model: what must be kept has been left out
            quantize_model(module, FORMATS[storage], kept=())

    def get_ready(model: Any, setup: Setup) -> None:
        ahead = setup.looks_ahead and "device-modulation" not in modes
        streamed, graphs = "streamed" in modes, "graphs" in modes
        ready(
            model,
            compute=compute,
            recompute=setup.recompute,
            ahead=ahead,
            streamed=streamed,
            graphs=graphs,
            transposed_codes=transposes and not streamed and reads_transposed(setup.device),
            compile=next((COMPILED[name] for name in modes if name in COMPILED), None),
        )

    products = [] if compute == "float" else [compute]
    modes = tuple(name for name in MODES if name in modes)
    weights = "unquantised" if storage == "bf16" else f"{storage} weights"
    return Contestant(
        "+".join(["fluxfast" if storage == "bf16" else f"fluxfast-{storage}", *products, *modes]),
        ", ".join(
            [
                "fluxfast",
                weights,
                *(f"{name} products" for name in products),
                *(MODES[name] for name in modes),
            ]
        ),
        model=FluxTransformer,
        storage=storage,
        bytes_per_weight=2.0 if storage == "bf16" else FORMATS[storage].bits_per_weight / 8,
        compute=compute,
        quantize=quantize,
        get_ready=get_ready,
        error=ERRORS[compute],
        exact=True,
        ours=True,
        cpu=not {"streamed", "graphs", "library", "fused", "device-modulation", "one-order"}
        & {*modes},
        route=TREAD if "tread" in modes else None,
        streamed="streamed" in modes,
        graphs="graphs" in modes,
        looks_ahead="device-modulation" not in modes,
        engine=next((name for name in ("library", "fused") if name in modes), None),
        transposes=transposes,
        adapter=next((ADAPTERS[name] for name in modes if name in ADAPTERS), "LoRA"),
    )


# (storage, products)
PRECISIONS = [
    ("bf16", "float"),
    *((storage, "float") for storage in FORMATS),
    *(("bf16", "int8"), ("int8", "int8"), ("nf4", "int8"), ("int4", "int8"), ("fp8_e4m3", "e4m3")),
]
CONTESTANTS = [
    *(_contestant(*precision, *modes) for precision in PRECISIONS for modes in ((), ("graphs",))),
    *(
        _contestant(*precision, "tread", *graphs)
        for precision in PRECISIONS
        for graphs in ((), ("graphs",))
    ),
    *(
        _contestant("bf16", "float", engine, *graphs)
        for engine in ("library", "fused")
        for graphs in ((), ("graphs",))
    ),
    _contestant("int8", "int8", "device-modulation"),
    _contestant("int8", "int8", "device-modulation", "graphs"),
    _contestant("int8", "int8", "one-order"),
    _contestant("int8", "int8", "graphs", "one-order"),
    *(
        _contestant(*precision, lokr, *graphs)
        for precision in (("bf16", "float"), ("int8", "float"), ("int8", "int8"))
        for lokr in ADAPTERS
        for graphs in ((), ("graphs",))
    ),
    *(
        _contestant(*precision, compiled)
        for precision in (("bf16", "float"), ("int8", "int8"), ("nf4", "float"))
        for compiled in COMPILED
    ),
    _contestant("bf16", "float", "graphs", "compile"),
    _contestant("int8", "int8", "graphs", "compile"),
    _contestant("bf16", "float", "streamed"),
    _contestant("int8", "int8", "streamed"),
    _contestant("int4", "int8", "streamed"),
]
