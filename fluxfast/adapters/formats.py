"""LoRA files: what fluxfast writes, and what it can go on training from.

Written, as `pytorch_lora_weights.safetensors` with keys `transformer.<module>.lora_A.weight` and `.lora_B.weight`:

    diffusers   metadata `lora_adapter_metadata` carries rank and alpha, where diffusers' `load_lora_weights` reads them
    comfyui     an fp32 scalar `transformer.<module>.alpha` beside each pair, which ComfyUI and diffusers read; diffusers
                refuses a file that has both

Read: both of these, PEFT's own keys (`base_model.model.`), ComfyUI's (`diffusion_model.`, diffusers' or BFL's module
names) and kohya's (`lora_unet_`), the last two through diffusers' converters. safetensors only: nothing is unpickled.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.lora import exported_state, inject, lora_layers
from fluxfast.files import write_atomic

LoraFormat = Literal["diffusers", "comfyui"]

_PREFIX = "transformer."
_BFL_MODULES = (
    "double_blocks.",
    "single_blocks.",
    "img_in.",
    "txt_in.",
    "time_in.",
    "vector_in.",
    "guidance_in.",
    "final_layer.",
)
# parts of keys that mean an adapter which isn't plain LoRA
_OTHER_ADAPTERS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT"}


def save_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: LoraFormat = "diffusers",
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Writes the adapter for the *original* base weights (see `exported_state`); returns the file's path.

    `path` is a folder, or a file's name ending in `.safetensors`. `metadata` is added to the file's own. The file is
    whole or absent, and the same adapter always gives the same bytes.
    """
    state, growth = exported_state(transformer, adapter_name)
    layers = lora_layers(transformer, adapter_name)
    packed = {_PREFIX + key: tensor for key, tensor in state.items()}
    header = {"format": "pt", **(metadata or {})}
    if format == "comfyui":
        for name, layer in layers.items():
            packed[f"{_PREFIX}{name}.alpha"] = torch.tensor(float(layer.lora_alpha[adapter_name] * growth))
    elif format == "diffusers":
        adapter = _adapter_metadata(transformer.peft_config[adapter_name], list(layers), growth)  # type: ignore[index]
        prefixed = {_PREFIX + key: value for key, value in adapter.items()}
        header[LORA_ADAPTER_METADATA_KEY] = json.dumps(prefixed, indent=2, sort_keys=True)
    else:
        raise ValueError(f"unknown lora_format {format!r}: choose diffusers or comfyui")
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / LORA_WEIGHT_NAME_SAFE
    write_atomic(file, _sorted_header(save(packed, metadata=header)))
    return file


def modelspec_metadata(
    *,
    flavour: str,
    title: str,
    resolution: tuple[int, int],
    global_step: int | None = None,
    trained_words: Sequence[str] = (),
) -> dict[str, str]:
    """Metadata by the Stability AI Model Metadata Standard 1.0.1 (github.com/Stability-AI/ModelSpec), for `save_lora`.

    `resolution` is width, height in pixels; `trained_words` are the instance prompts. No date: two equal runs write equal
    files.
    """
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"flux-{flavour}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": "{}x{}".format(*resolution),
        "modelspec.trigger_phrase": ", ".join(trained_words),
        "global_step": "" if global_step is None else str(global_step),
    }
    return {key: value for key, value in metadata.items() if value}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies in a file. Modules are named as in diffusers' transformer, without a prefix."""

    path: Path
    state: dict[str, Tensor]  # <module>.lora_A.weight [rank, in] and <module>.lora_B.weight [out, rank]
    ranks: dict[str, int]
    alphas: dict[str, float]
    metadata: dict[str, str]

    @property
    def targets(self) -> list[str]:
        return list(self.ranks)

    @property
    def rank(self) -> int:
        """The rank of most modules."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most modules."""
        return Counter(self.alphas.values()).most_common(1)[0][0]


def read_lora(path: str | os.PathLike[str]) -> LoraFile:
    """Reads a LoRA for FLUX.1's transformer, a file or a folder with one; tells its format by its keys.

    Alpha comes from the file's alpha tensors, else from its metadata, else it is the rank. ValueError, naming the file,
    where it isn't safetensors, is cut off, or holds anything but LoRA pairs for the transformer.
    """
    file = _find(Path(path))
    raw, metadata = _read(file)
    state, alphas = _to_diffusers(file, raw)
    ranks = _paired_ranks(file, state)
    settings = _adapter_settings(file, metadata)
    resolved = {name: alphas.get(name, _alpha_from_metadata(settings, name, rank)) for name, rank in ranks.items()}
    return LoraFile(file, state, ranks, resolved, metadata)


def load_lora(
    transformer: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> list[Parameter]:
    """Goes on training a LoRA (`init_lora`): like `add_lora`, with modules, ranks, alphas and values from the file.

    Raises `read_lora`'s errors, and ValueError where a module isn't in the transformer or has another shape there.
    """
    lora = read_lora(path)
    _check_fits(transformer, lora)
    rank, alpha = lora.rank, lora.alpha
    # PEFT reads a string as a regular expression for the whole name: `proj_out` then means that module alone
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(_exactly(name) for name in lora.targets),
        rank_pattern={f"^{_exactly(name)}": r for name, r in lora.ranks.items() if r != rank},
        alpha_pattern={f"^{_exactly(name)}": a for name, a in lora.alphas.items() if a != alpha},
    )
    parameters = inject(transformer, config, adapter_name, dtype)
    with torch.no_grad():
        for name, layer in lora_layers(transformer, adapter_name).items():
            layer.lora_A[adapter_name].weight.copy_(lora.state[f"{name}.lora_A.weight"])
            layer.lora_B[adapter_name].weight.copy_(lora.state[f"{name}.lora_B.weight"])
    return parameters


def _exactly(name: str) -> str:
    return name.replace(".", r"\.")


def _adapter_metadata(config: Any, modules: list[str], growth: int) -> dict[str, Any]:
    """The LoraConfig that a reader rebuilds: the fields that every PEFT knows, since an unknown one fails its load."""
    exact = isinstance(config.target_modules, str)
    return {
        "r": config.r * growth,
        "lora_alpha": config.lora_alpha * growth,
        # not the run's: diffusers leaves the dropout it makes in training mode, and would drop at inference
        "lora_dropout": 0.0,
        "target_modules": modules if exact else sorted(config.target_modules),
        "rank_pattern": {name: rank * growth for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: alpha * growth for name, alpha in config.alpha_pattern.items()},
        "bias": "none",
        # not the run's initialiser: some of them would change the reader's base weights
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order; safetensors writes it in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _find(path: Path) -> Path:
    if path.is_dir():
        named = path / LORA_WEIGHT_NAME_SAFE
        files = [named] if named.is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"{path}: expected one LoRA, {LORA_WEIGHT_NAME_SAFE}, in this folder; found {len(files)} files")
        return files[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such LoRA file")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA must be a .safetensors file; pickled formats are never loaded")
    return path


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; what can't be a LoRA is refused by its keys, before its tensors are read."""
    try:
        with safe_open(file, framework="pt") as reader:
            keys = list(reader.keys())
            for part, kind in _OTHER_ADAPTERS.items():
                found = [key for key in keys if part in key]
                if found:
                    raise ValueError(f"{file}: holds {kind} weights ({found[0]}), which fluxfast can't continue from yet")
            if not any("lora" in key for key in keys):
                raise ValueError(f"{file}: holds no LoRA weights; its first keys: {_first(sorted(keys))}")
            return {key: reader.get_tensor(key) for key in keys}, reader.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from error


def _adapter_settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The LoraConfig fields that the file's metadata gives for the transformer."""
    try:
        settings = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY} isn't JSON ({error})") from error
    return {key.removeprefix(_PREFIX): value for key, value in settings.items()}


def _to_diffusers(file: Path, raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Any known layout -> (diffusers' keys without prefix, alpha by module where the file says it in tensors)."""
    renamed = {}
    for key, tensor in raw.items():
        name = key.removeprefix("base_model.model.").removeprefix("diffusion_model.")
        if name.startswith(_BFL_MODULES):
            # diffusers' converter knows BFL's names in ComfyUI's prefix and kohya's pair
            name = "diffusion_model." + name.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
        renamed[name] = tensor
    try:
        state, alphas = FluxLoraLoaderMixin.lora_state_dict(renamed, return_alphas=True)
    except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{file}: its LoRA keys can't be converted ({' '.join(str(error).split())[:300]})") from error
    foreign = [key for key in state if key.startswith("text_encoder")]
    if foreign:
        raise ValueError(f"{file}: holds text encoder weights ({foreign[0]}); fluxfast trains the transformer alone")
    return (
        {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()},
        {key.removeprefix(_PREFIX).removesuffix(".alpha"): float(value) for key, value in (alphas or {}).items()},
    )


def _paired_ranks(file: Path, state: dict[str, Tensor]) -> dict[str, int]:
    """Rank by module, after checking that the state is LoRA pairs and nothing else."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    modules = [key.removesuffix(down) for key in state if key.endswith(down)]
    expected = {name + suffix for name in modules for suffix in (down, up)}
    unexpected, missing = sorted(state.keys() - expected), sorted(expected - state.keys())
    if not modules or unexpected or missing:
        raise ValueError(
            f"{file}: not a LoRA for FLUX.1's transformer. Missing keys: {_first(missing)}; unexpected: {_first(unexpected)}"
        )
    for name in modules:
        a, b = state[name + down], state[name + up]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{file}: {name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} don't share a rank")
    return {name: state[name + down].shape[0] for name in modules}


def _alpha_from_metadata(settings: Mapping[str, Any], name: str, rank: int) -> float:
    pattern = settings.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), name), settings.get("lora_alpha", rank))
    # rank-stabilised LoRA scales by alpha / √rank
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def _check_fits(transformer: nn.Module, lora: LoraFile) -> None:
    modules: dict[str, Any] = dict(transformer.named_modules())
    unexpected = [name for name in lora.targets if not hasattr(modules.get(name), "in_features")]
    if unexpected:
        raise ValueError(f"{lora.path}: the transformer has no such linear layers: {_first(unexpected)}")
    for name, rank in lora.ranks.items():
        module = modules[name]
        for key, expected in (("lora_A", [rank, module.in_features]), ("lora_B", [module.out_features, rank])):
            found = list(lora.state[f"{name}.{key}.weight"].shape)
            if found != expected:
                raise ValueError(f"{lora.path}: {name}.{key}: expected {expected} for this transformer, found {found}")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
