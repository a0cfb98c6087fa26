"""The optimisers: what config, plan and trainer know of each, a record for each.

A new optimiser is a record here; its class may be of any package. Nothing is imported until a run
builds it. The names and their defaults are SimpleTuner's.
"""

import ast
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

_Defaults = Mapping[str, Any]
# whose version of an optimiser runs
OptimizerImpl = Literal["auto", "fluxfast", "package"]
_LION: _Defaults = {"betas": (0.9, 0.99), "weight_decay": 0.0}
_ADAMW: _Defaults = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
_OPTIMI: _Defaults = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0}
_ADEMAMIX: _Defaults = {"betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "weight_decay": 0.01}
# how configs write True, False and None
_WORDS = ("true", "false", "none")
# the extras that bring an optimiser's module; the modules of the others are always installed
_EXTRAS = {"schedulefree": "schedulefree", "prodigyplus": "prodigy", "torchao": "torchao"}
# what SimpleTuner has of the same kinds, and why fluxfast does not
NO_OPTIMIZERS = {
    "sdnq-*": "SDNQ's optimisers train weights that SDNQ quantised, and a LoRA's are not quantised",
    "torch-sparseadam": "it takes sparse gradients only, and a LoRA's are dense",
}


@dataclass(frozen=True)
class FusedVersion:
    """A class of ours that computes what a package's does, in one launch for all tensors.

    Attributes:
        entry_point: as in `OptimizerKind`.
        kernel: its name among fluxfast's ops.
        arguments: the keyword arguments that it takes.
    """

    entry_point: str
    kernel: str
    arguments: frozenset[str]


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser that a run may have.

    Attributes:
        entry_point: "module:name" of its class, which takes the parameters' groups, `lr` and the
            keyword arguments below.
        weights: type of the weights it trains. "bf16" needs a run in bf16; "fp32" keeps them in
            fp32 in any run.
        state_bytes: bytes of its state for each parameter, by the bytes of the parameter.
        defaults: keyword arguments of the class, with the values that they have unless the config
            says otherwise (`TrainConfig.optimizer_arguments`).
        takes_seed: whether the class takes a `seed`, for random rounding.
        kernel: the name among fluxfast's ops of the Triton kernel that `entry_point` runs on, which
            a run on a GPU checks first; None where it is a package's.
        fused: our version of a package's class.
        clips: whether it bounds its updates itself, so that gradients are not clipped before it.
        averages: whether the weights to keep and to draw with are an average that it holds beside
            those that it trains (schedule-free methods). It then needs no schedule either.
        finds_rate: whether it finds the learning rate itself, and multiplies it by the config's,
            which should be 1 then.
        on_cpu: keyword arguments of the class on a CPU, where its own choice does not run.
        cpu_entry_point: the class that computes the same on a CPU, where `entry_point`'s does not.
        is_option: whether a config may name it; the others are planned and benchmarked only.
        package: the module that has to be installed, where it is not that of `entry_point`.
        sorts_matrices: whether each group of parameters has to say, as `use_muon`, if they are
            matrices.
    """

    entry_point: str
    weights: Literal["bf16", "fp32"]
    state_bytes: Callable[[int], float]
    defaults: _Defaults
    takes_seed: bool = False
    kernel: str | None = None
    fused: FusedVersion | None = None
    clips: bool = False
    averages: bool = False
    finds_rate: bool = False
    on_cpu: Mapping[str, Any] = field(default_factory=dict)
    cpu_entry_point: str | None = None
    is_option: bool = True
    package: str | None = None
    sorts_matrices: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that it trains."""
        return 2 if self.weights == "bf16" else 4

    def version(self, impl: OptimizerImpl, given: Collection[str]) -> FusedVersion | None:
        """Our version, where a run takes it: where there is one, and it has all that is `given`.

        given: names of further arguments. Raises ValueError, whose text goes on after the
        optimiser's name, where `impl` asks for what there is not.
        """
        own = self.kernel is not None
        lacks = sorted(set(given) - self.fused.arguments) if self.fused else []
        if impl == "package" and own:
            raise ValueError("is fluxfast's own: no package has it")
        if impl == "fluxfast" and not own and self.fused is None:
            raise ValueError("has no version of fluxfast's")
        if impl == "fluxfast" and lacks:
            raise ValueError(f"takes no {', '.join(lacks)} in fluxfast's version")
        return None if impl == "package" or lacks else self.fused

    def missing_extra(self, version: FusedVersion | None) -> str | None:
        """The extra of fluxfast that installs its package; None where that is there.

        Our version needs none.
        """
        module = self.package or self.entry_point.partition(":")[0].partition(".")[0]
        if version is not None or find_spec(module):
            return None
        return _EXTRAS.get(module, module)


def _tensors(number: int) -> Callable[[int], float]:
    """So many tensors of the parameter's shape and type."""
    return lambda itemsize: number * itemsize


def _in_bits(number: int, bits: int = 8, block: int = 256) -> Callable[[int], float]:
    """So many states in a few bits, each with an fp32 scale for every block of elements."""
    return lambda itemsize: number * (bits / 8 + 4 / block)


def _of_torch() -> dict[str, OptimizerKind]:
    kinds: dict[str, tuple[str, int, _Defaults]] = {
        "adamw": ("AdamW", 2, _ADAMW),
        "adam": ("Adam", 2, {**_ADAMW, "weight_decay": 0.0}),
        "radam": ("RAdam", 2, {**_ADAMW, "weight_decay": 0.0}),
        "nadam": ("NAdam", 2, {**_ADAMW, "weight_decay": 0.0}),
        "adamax": ("Adamax", 2, {**_ADAMW, "weight_decay": 0.0}),
        "adadelta": ("Adadelta", 2, {"eps": 1e-6, "weight_decay": 0.0}),
        "asgd": ("ASGD", 1, {"weight_decay": 0.0}),
        "sgd": ("SGD", 0, {"momentum": 0.0, "weight_decay": 0.0}),
        "adafactor": ("Adafactor", 0, {"weight_decay": 0.0}),
        "adagrad": ("Adagrad", 1, {"eps": 1e-10, "weight_decay": 0.0}),
        "rmsprop": ("RMSprop", 1, {"eps": 1e-8, "weight_decay": 0.0}),
    }
    return {
        f"torch-{name}": OptimizerKind(
            f"torch.optim:{cls}", weights="fp32", state_bytes=_tensors(number), defaults=defaults
        )
        for name, (cls, number, defaults) in kinds.items()
    }


def _of_optimi() -> dict[str, OptimizerKind]:
    kinds: dict[str, tuple[str, int, _Defaults]] = {
        "adamw": ("AdamW", 2, _OPTIMI),
        "lion": ("Lion", 1, _LION),
        "stableadamw": ("StableAdamW", 2, _OPTIMI),
        "adam": ("Adam", 2, {**_OPTIMI, "weight_decay": 0.0}),
        "radam": ("RAdam", 2, {**_OPTIMI, "weight_decay": 0.0}),
        "ranger": ("Ranger", 3, {**_OPTIMI, "weight_decay": 0.0}),
        "adan": ("Adan", 4, {"betas": (0.98, 0.92, 0.999), "eps": 1e-6, "weight_decay": 0.02}),
        "sgd": ("SGD", 0, {"momentum": 0.0, "weight_decay": 0.0}),
    }
    return {
        f"optimi-{name}": OptimizerKind(
            f"optimi:{cls}",
            weights="fp32",
            state_bytes=_tensors(number),
            defaults=defaults,
            clips=name == "stableadamw",
            # its Triton kernels are chosen wherever Triton is installed
            on_cpu={"triton": False},
        )
        for name, (cls, number, defaults) in kinds.items()
    }


def _fused(cls: str) -> FusedVersion | None:
    """Our version of one of bitsandbytes' classes; its Adam is its AdamW with another default.

    A state of ours has no pages that could leave the GPU, so there is none of the paged classes.
    """
    arguments = {"betas", "weight_decay", "min_8bit_size", "impl"}
    formula, bits = cls.removesuffix("8bit"), "8bit" if cls.endswith("8bit") else ""
    if formula == "Lion":
        kernel = "blockwise_lion"
    elif formula in ("Adam", "AdamW"):
        formula, kernel = "AdamW", "blockwise_adamw"
        arguments.add("eps")
    else:
        return None
    entry_point = f"fluxfast.train.blockwise_optim:{formula}{bits}"
    return FusedVersion(entry_point, kernel, frozenset(arguments))


def _of_bitsandbytes() -> dict[str, OptimizerKind]:
    kinds: dict[str, tuple[str, int, _Defaults]] = {
        "adamw": ("AdamW", 2, _ADAMW),
        "lion": ("Lion", 1, _LION),
        "ademamix": ("AdEMAMix", 3, _ADEMAMIX),
        "adam": ("Adam", 2, {**_ADAMW, "weight_decay": 0.0}),
        "adagrad": ("Adagrad", 1, {"eps": 1e-10, "weight_decay": 0.0}),
    }
    found = {}
    for name, (cls, number, defaults) in kinds.items():
        for bits, state_bytes in (("", _tensors(number)), ("8bit", _in_bits(number))):
            for paged in ("", "Paged") if name != "adagrad" else ("",):
                option = f"bnb-{name}{bits}{'-paged' if paged else ''}"
                given = defaults
                if name == "adamw":
                    given = {**defaults, "eps": 1e-6}
                found[option] = OptimizerKind(
                    f"bitsandbytes.optim:{paged}{cls}{bits}",
                    weights="fp32",
                    state_bytes=state_bytes,
                    defaults=given,
                    fused=_fused(f"{paged}{cls}{bits}"),
                    cpu_entry_point=f"bitsandbytes.optim:{cls}{bits}" if paged else None,
                )
    return found


def _of_torchao() -> dict[str, OptimizerKind]:
    kinds: dict[str, tuple[str, int, int]] = {
        "adamw8bit": ("AdamW8bit", 8, 256),
        "adamw4bit": ("AdamW4bit", 4, 128),
        "adamwfp8": ("AdamWFp8", 8, 256),
        "adamfp8": ("AdamFp8", 8, 256),
    }
    return {
        f"ao-{name}": OptimizerKind(
            f"fluxfast.train.torchao_optim:{cls}",
            weights="fp32",
            state_bytes=_in_bits(2, bits, block),
            defaults={**_ADAMW, "eps": 1e-6},
            package="torchao",
        )
        for name, (cls, bits, block) in kinds.items()
    }


def _schedule_free(**defaults: Any) -> OptimizerKind:
    return OptimizerKind(
        "schedulefree:AdamWScheduleFree",
        weights="fp32",
        state_bytes=_tensors(2),
        defaults={**_ADAMW, "warmup_steps": 0, **defaults},
        averages=True,
    )


OPTIMIZERS = {
    "adamw_bf16": OptimizerKind(
        "fluxfast.train.adamw_bf16:AdamWBF16",
        weights="bf16",
        state_bytes=_tensors(2),
        defaults={"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
        takes_seed=True,
        kernel="adamw_bf16",
    ),
    **_of_torch(),
    **_of_optimi(),
    **_of_bitsandbytes(),
    "ademamix": OptimizerKind(
        "pytorch_optimizer:AdEMAMix",
        weights="fp32",
        state_bytes=_tensors(3),
        defaults={**_ADEMAMIX, "weight_decouple": True},
    ),
    "soap": OptimizerKind(
        "pytorch_optimizer:SOAP",
        weights="fp32",
        state_bytes=_tensors(2),
        # a basis of a LoRA's long side would be 192 times its factor of rank 16
        defaults={
            "betas": (0.95, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.01,
            "max_precondition_dim": 128,
        },
    ),
    "muon": OptimizerKind(
        "pytorch_optimizer:Muon",
        weights="fp32",
        # of a matrix, as all factors of LoRAs are; AdamW's two of anything else
        state_bytes=_tensors(1),
        defaults={"momentum": 0.95, "weight_decay": 0.1},
        sorts_matrices=True,
    ),
    **_of_torchao(),
    "adamw_schedulefree": _schedule_free(),
    "adamw_schedulefree+aggressive": _schedule_free(weight_decay=1e-3, eps=1e-6),
    # Kahan's sums do nothing for weights in fp32
    "adamw_schedulefree+no_kahan": _schedule_free(weight_decay=1e-3, eps=1e-6),
    "prodigy": OptimizerKind(
        "prodigyplus:ProdigyPlusScheduleFree",
        weights="fp32",
        # z, and two sixteenths of the parameter in bf16; the second moment is factored
        state_bytes=lambda itemsize: itemsize + 4 / 11,
        defaults={"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "prodigy_steps": 0},
        clips=True,
        averages=True,
        finds_rate=True,
    ),
    "adamw8bit": OptimizerKind(
        "bitsandbytes.optim:AdamW8bit",
        weights="fp32",
        state_bytes=_in_bits(2),
        defaults=_ADAMW,
        is_option=False,
    ),
}


def optimizer_options() -> list[str]:
    """The names that a config may say."""
    return [name for name, kind in OPTIMIZERS.items() if kind.is_option]


def read_arguments(text: str) -> dict[str, Any] | None:
    """The arguments in an `optimizer_config` such as "eps=1e-6,betas=(0.9, 0.99)"; None of "".

    Values are Python's numbers, texts in quotes, tuples, True, False and None; words are texts.
    ValueError where it is something else.
    """
    names = list(re.finditer(r"(?:^|,)\s*([A-Za-z_]\w*)\s*=", text))
    if not text.strip():
        return None
    if not names or text[: names[0].start()].strip():
        raise ValueError('expects "name=value,name=value", or an object')
    ends = [*(match.start() for match in names[1:]), len(text)]
    values = {}
    for match, end in zip(names, ends, strict=True):
        value = text[match.end() : end].strip()
        try:
            values[match[1]] = ast.literal_eval(value.capitalize() if value in _WORDS else value)
        except (ValueError, SyntaxError):
            if not re.fullmatch(r"[\w.+-]+", value):
                raise ValueError(f"can't read the value of {match[1]}: {value!r}") from None
            values[match[1]] = value
    return values
