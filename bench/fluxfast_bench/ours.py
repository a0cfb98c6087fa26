"""fluxfast's own contestants: storage formats, 8-bit products, TREAD, blocks streamed from host memory, CUDA graphs."""

from __future__ import annotations

from typing import Any

from torch import nn

from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from fluxfast_bench.contestants import Contestant
from fluxfast_bench.floor import Route

TREAD = Route(ratio=0.5)
MODES = {"tread": "TREAD 0.5", "streamed": "streamed", "graphs": "CUDA graphs"}
# against weights as they are stored, so what is left is rounding: of activations, and of weights to 8 bits
ERRORS = {"float": 0.04, "int8": 0.08, "e4m3": 0.15}


def _contestant(
    storage: str = "bf16",
    compute: str = "float",
    route: Route | None = None,
    *,
    streamed: bool = False,
    graphs: bool = False,
) -> Contestant:
    def quantize(module: nn.Module) -> None:
        if storage != "bf16":
            # a part of the model: what must be kept has been left out
            quantize_model(module, FORMATS[storage], kept=())

    def finish(model: Any) -> None:
        if compute != "float":
            model.set_compute(compute)
        if streamed:
            from fluxfast.memory.offload import stream_blocks

            stream_blocks(model, model.device)
        if graphs:
            model.set_cuda_graphs(True)

    products = [] if compute == "float" else [compute]
    chosen = {"tread": route is not None, "streamed": streamed, "graphs": graphs}
    modes = {name: title for name, title in MODES.items() if chosen[name]}
    weights = "unquantised" if storage == "bf16" else f"{storage} weights"
    return Contestant(
        "+".join(["fluxfast" if storage == "bf16" else f"fluxfast-{storage}", *products, *modes]),
        ", ".join(["fluxfast", weights, *(f"{name} products" for name in products), *modes.values()]),
        model=FluxTransformer,
        storage=storage,
        bytes_per_weight=2.0 if storage == "bf16" else FORMATS[storage].bits_per_weight / 8,
        compute=compute,
        quantize=quantize,
        policy=lambda model, recompute: model.set_recompute(recompute),
        finish=finish,
        error=ERRORS[compute],
        exact=True,
        ours=True,
        cpu=not streamed and not graphs,
        route=route,
    )


CONTESTANTS = [
    _contestant(),
    _contestant(compute="int8"),
    _contestant("int8", "int8"),
    _contestant("int8", "int8", TREAD),
    _contestant("int8", "int8", graphs=True),
    _contestant("int8", "int8", TREAD, graphs=True),
    _contestant("nf4", "int8"),
    _contestant("int4", "int8"),
    _contestant("int4", "int8", streamed=True),
    _contestant("fp8_e4m3", "e4m3"),
    _contestant(route=TREAD),
    *(_contestant(storage) for storage in FORMATS),
]
