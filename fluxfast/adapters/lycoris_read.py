"""What the tensors of a LyCORIS adapter say of it: algorithm, rank, alpha and shapes by module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fluxfast.config.lycoris import LycorisOptions

# the algorithm by a tensor that only it has; `oft_blocks` and `weight` are told by their shapes
_SIGNS = {
    "lokr_w1": "lokr", "lokr_w1_a": "lokr", "hada_w1_a": "loha", "up_list.0": "dylora",
    "lora_up.weight": "locon", "a1.weight": "glora", "diff": "full", "on_input": "ia3",
}  # fmt: skip
_ENDINGS = (
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
    "lora_up.weight", "lora_down.weight", "a1.weight", "a2.weight", "b1.weight", "b2.weight",
    "diff", "diff_b", "weight", "on_input", "oft_blocks", "rescale",
    "alpha", "scalar", "dora_scale",
)  # fmt: skip


def by_module(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by the names that they have in it.

    ValueError for a tensor that no algorithm has.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, ending = _split(path, name)
        modules.setdefault(module, {})[ending] = tensor
    return modules


def _split(path: Path, name: str) -> tuple[str, str]:
    parts = name.split(".")
    for count in (2, 1):
        module, ending = ".".join(parts[:-count]), ".".join(parts[-count:])
        if module and (ending in _ENDINGS or ending.startswith(("up_list.", "down_list."))):
            return module, ending
    raise ValueError(f"{path}: {name} is no tensor of a LyCORIS algorithm")


def options_of(path: Path, module: str, tensors: Mapping[str, Tensor]) -> LycorisOptions:
    """The options with which a module has these tensors; those that none shows have defaults.

    ValueError where they belong to no algorithm for linears.
    """
    algo = next((algo for sign, algo in _SIGNS.items() if sign in tensors), None)
    if "oft_blocks" in tensors:
        algo = "diag-oft" if tensors["oft_blocks"].ndim == 3 else "boft"
    if algo is None:
        raise ValueError(
            f"{path}: {module} has the tensors of no algorithm: {', '.join(sorted(tensors))}"
        )
    shown: dict[str, object] = {"algo": algo, "use_scalar": "scalar" in tensors}
    if "dora_scale" in tensors:
        shown |= {"weight_decompose": True, "wd_on_out": tensors["dora_scale"].shape[1:] == (1,)}
    shown |= _shown_by(algo, tensors)
    alpha = tensors.get("alpha")
    if algo in ("diag-oft", "boft"):
        shown["constraint"] = 0.0 if alpha is None else float(alpha)
    elif "dim" in shown:
        shown["alpha"] = float(shown["dim"] if alpha is None else alpha)  # type: ignore[arg-type]
    return LycorisOptions.model_validate(shown)


def _shown_by(algo: str, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """What the shapes of an algorithm's tensors say."""
    if algo == "lokr":
        factors = {n: tuple(t.shape) for n, t in sorted(tensors.items()) if n.startswith("lokr_w")}
        ranks = [shape[1] for name, shape in factors.items() if name.endswith("_a")]
        return {"factors": tuple(factors.items()), "dim": ranks[0] if ranks else 1}
    if algo == "loha":
        return {"dim": len(tensors["hada_w1_b"])}
    if algo == "locon":
        return {"dim": len(tensors["lora_down.weight"])}
    if algo == "glora":
        return {"dim": len(tensors["a2.weight"])}
    if algo == "dylora":
        blocks = [tensor for name, tensor in tensors.items() if name.startswith("down_list.")]
        return {"dim": sum(len(block) for block in blocks), "block_size": len(blocks[0])}
    if algo in ("diag-oft", "boft"):
        return {"dim": tensors["oft_blocks"].shape[-1], "rescaled": "rescale" in tensors}
    return {"train_on_input": bool(tensors["on_input"])} if algo == "ia3" else {}
