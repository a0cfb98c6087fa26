"""SimpleTuner's `lycoris_config`: which LyCORIS algorithm goes on which linears, with what options.

The file holds the arguments of lycoris-lora's `create_lycoris`, and beside them `apply_preset`, the
targets. `preset` may name further targets: one of the library's own presets, or a TOML file. Names
and meanings are the library's (4.1). What it would leave out without a word is refused here, and
numbers stay numbers, where SimpleTuner cuts some of them to integers.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, model_serializer

from fluxfast.config.run_file import read_toml
from fluxfast.config.settings import (
    Settings,
    did_you_mean,
    named_in,
    problem_text,
    quoted,
    read_json,
    shown,
)

ALGORITHMS = (
    "lora", "locon", "loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3",
)  # fmt: skip


class LycorisOptions(Settings):
    """An algorithm for one linear, with its options, under the names of the library's modules.

    Attributes:
        dim, alpha: the scale is alpha / dim. An alpha of 0 is dim, as is that of a LoKr of two
            whole factors.
        multiplier: a further factor of all that the adapter adds.
        factor: what LoKr divides in and out features by, as near as they can be divided; -1: as
            evenly as possible.
        factors: the shapes of LoKr's factors by name, of an adapter that was read from a file;
            empty: they follow from the options.
        bypass_mode: the adapter's part is computed beside the base's product, in place of one
            product with the changed weight.
        weight_decompose: the length of each row of the changed weight is trained apart; without
            wd_on_out, that of each column.
    """

    algo: Annotated[str, named_in(lambda: ALGORITHMS)]
    multiplier: float = 1.0
    dim: int = Field(4, ge=1)
    alpha: float = Field(1.0, ge=0)
    factor: int = Field(-1, ge=-1)
    factors: tuple[tuple[str, tuple[int, int]], ...] = ()
    full_matrix: bool = False
    decompose_both: bool = False
    unbalanced_factorization: bool = False
    use_scalar: bool = False
    use_tucker: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    module_dropout: float = Field(0.0, ge=0, lt=1)
    rescaled: bool = False
    constraint: float = Field(0.0, ge=0)
    block_size: int = Field(4, ge=1)
    weight_decompose: bool = False
    wd_on_out: bool = True
    bypass_mode: bool = False
    train_on_input: bool = False

    def with_changes(self, changes: Mapping[str, Any]) -> "LycorisOptions":
        """The same but for some options, which are valid already."""
        return self.model_copy(update=dict(changes))


# keys that change nothing on FLUX.1, and why
_WITHOUT_EFFECT = {
    **dict.fromkeys(
        ("conv_dim", "conv_alpha", "use_tucker", "enable_conv"), "FLUX.1 has no convolutions"
    ),
    **dict.fromkeys(
        (
            "unet_target_module", "unet_target_name", "text_encoder_target_module",
            "text_encoder_target_name",
        ),
        "lycoris-lora reads it for kohya's scripts alone",
    ),
}  # fmt: skip
# what a run and an entry of a map call alike
_SHARED = (
    "algo", "factor", "full_matrix", "decompose_both", "unbalanced_factorization", "use_scalar",
    "use_tucker", "rescaled", "constraint", "block_size", "bypass_mode",
)  # fmt: skip
# the run's own words for options that an entry calls by the library's names
_RUN_WORDS = {
    "linear_dim": "dim",
    "linear_alpha": "alpha",
    "dora_wd": "weight_decompose",
    "wd_on_output": "wd_on_out",
}
_OF_RUN = {
    **{key: key for key in (*_SHARED, "multiplier", "dropout", "rank_dropout", "module_dropout")},
    **_RUN_WORDS,
}
_OF_ENTRY = (*_SHARED, *_RUN_WORDS.values(), "train_on_input")
# the run's keys that are no options of an algorithm
_BESIDE = ("apply_preset", "preset", "train_norm", "conv_dim", "conv_alpha")

# The library's presets that a run of SimpleTuner's can name. There they only say whether
# convolutions are trained, and "ia3" has two names on top.
_ON_INPUT = {"train_on_input": True}
LIBRARY_PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "full-lin": {},
    "attn-mlp": {},
    "attn-only": {},
    "unet-only": {},
    "unet-transformer-only": {},
    "unet-convblock-only": {},
    "ia3": {"name_algo_map": {"mlp.fc2": _ON_INPUT, "ff.net.2": _ON_INPUT}},
}


class LycorisTargets(Settings):
    """Where adapters go: the keys of `apply_preset`.

    Attributes:
        target_module: names of classes; all linears inside such a module have an adapter.
        target_name: names of linears, as regular expressions that a name begins with, or, with
            use_fnmatch, as patterns with wildcards for the whole name.
        module_algo_map, name_algo_map: more of both, with options of their own.
        exclude_name: names that have none, written as in target_name.
        lora_prefix: what names begin with in LyCORIS's own files.
    """

    target_module: tuple[str, ...] = ("Linear",)
    target_name: tuple[str, ...] = ()
    module_algo_map: dict[str, dict[str, Any]] = Field(default_factory=dict)
    name_algo_map: dict[str, dict[str, Any]] = Field(default_factory=dict)
    use_fnmatch: bool = False
    exclude_name: tuple[str, ...] = ()
    lora_prefix: str = Field("lycoris", min_length=1)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Everything that names are matched with."""
        return (*self.target_name, *self.name_algo_map, *self.exclude_name)


class LycorisConfig(Settings):
    """A run's `lycoris_config`, read and checked.

    Attributes:
        given: the file's content.
        options: those of each linear that no map says more about.
        modules: the linears by name, where a file that the run goes on from decides in place of
            the targets.
        notes: lines for the user.
    """

    given: dict[str, Any]
    options: LycorisOptions
    targets: LycorisTargets
    modules: dict[str, LycorisOptions] | None = None
    notes: tuple[str, ...] = ()

    @property
    def algorithms(self) -> set[str]:
        """All that are named, whether a linear has them or not."""
        maps = (*self.targets.module_algo_map.values(), *self.targets.name_algo_map.values())
        return {self.options.algo, *(entry["algo"] for entry in maps if "algo" in entry)}

    def of_modules(self, modules: Mapping[str, LycorisOptions]) -> "LycorisConfig":
        """The same for these linears, whatever the targets name."""
        return self.model_copy(update={"modules": dict(modules)})

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        return self.given


class _Reading(NamedTuple):
    """The file that is read, and the problems and notes that came up on the way."""

    path: Path
    problems: list[str]
    notes: list[str]

    def known(self, given: Iterable[str], known: Iterable[str], where: str = "") -> list[str]:
        """Those of the given keys that are known; the others are problems."""
        names = [*known]
        for key in given:
            if key not in names:
                self.problem(
                    f'{where}"{key}" is not known{did_you_mean(key, names)} '
                    f"(known: {', '.join(sorted(names))})"
                )
        return [key for key in given if key in names]

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.path}: {text}")

    def made(
        self, kind: type[Settings], values: dict[str, Any], names: dict[str, str], where: str = ""
    ) -> Any:
        """An object of these values; None and problems, under the file's names, where they are
        wrong.
        """
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            written = {option: key for key, option in names.items()}
            for detail in error.errors(include_url=False):
                first, *inner = map(str, detail["loc"])
                place = ".".join([written.get(first, first), *inner])
                self.problem(f'{where}"{place}" {problem_text(detail)}')
            return None


def read_lycoris(path: Path) -> LycorisConfig:
    """The `lycoris_config` in a JSON file.

    Raises ConfigError, or a ValueError of a line for each problem: keys that are missing, unknown
    or of a wrong value, options that can't go together, and patterns that are no regular
    expressions.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold an object ({{...}}), not {shown(raw)}")
    # null asks for the default
    given = {key: value for key, value in raw.items() if value is not None}
    reading = _Reading(path, [], [])
    needed = ("algo", "multiplier", "linear_alpha", "linear_dim")
    absent = [key for key in needed if key not in given]
    if given.get("full_matrix") is True and "linear_dim" in absent:
        absent.remove("linear_dim")
    for key in absent:
        unless = ' (only with "full_matrix" true it need not be)' if key == "linear_dim" else ""
        reading.problem(f'"{key}" is required{unless}')
    known = reading.known(given, (*_OF_RUN, *_BESIDE))
    if isinstance(given.get("algo"), str):
        given["algo"] = given["algo"].lower()
    values = {_OF_RUN[key]: given[key] for key in known if key in _OF_RUN}
    stand_in = {} if "algo" in values else {"algo": "lokr"}
    options = reading.made(LycorisOptions, values | stand_in, _OF_RUN)
    targets = _read_targets(reading, given, options)
    if options is not None:
        _check_options(reading, options, "")
    _check_run(reading, given, options)
    if reading.problems or options is None or targets is None:
        raise ValueError("\n".join(reading.problems))
    return LycorisConfig(given=raw, options=options, targets=targets, notes=tuple(reading.notes))


def _read_targets(
    reading: _Reading, given: Mapping[str, Any], options: LycorisOptions | None
) -> LycorisTargets | None:
    """What `apply_preset` says, and `preset` after it, which takes the place of its keys."""
    keys: dict[str, Any] = {}
    for entry in ("apply_preset", "preset"):
        value = given.get(entry, {})
        if entry == "preset" and isinstance(value, str):
            value = _preset(reading, value)
        if not isinstance(value, dict):
            reading.problem(f'"{entry}" is {shown(value)}: expects an object with targets')
            continue
        ignored = [key for key in _WITHOUT_EFFECT if key in value]
        allowed = (*LycorisTargets.model_fields, "enable_conv", *_WITHOUT_EFFECT)
        own = reading.known(value, dict.fromkeys(allowed), f'"{entry}": ')
        keys |= {key: value[key] for key in own if key not in _WITHOUT_EFFECT}
        reading.notes.extend(_no_effect(reading, key) for key in ignored if key != "enable_conv")
    for map_name in ("module_algo_map", "name_algo_map"):
        entries = keys.get(map_name)
        if isinstance(entries, dict):
            keys[map_name] = {
                target: _read_entry(reading, entry, options, f'"{map_name}": "{target}": ')
                for target, entry in entries.items()
            }
    targets = reading.made(LycorisTargets, keys, {}, '"apply_preset": ')
    if targets is not None and not targets.use_fnmatch:
        for pattern in targets.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                reading.problem(
                    f'"{pattern}" is no regular expression: {error}; for wildcards set '
                    '"use_fnmatch": true'
                )
    return targets


def _preset(reading: _Reading, name: str) -> Any:
    if name in LIBRARY_PRESETS:
        return LIBRARY_PRESETS[name]
    if Path(name).suffix == ".toml":
        return read_toml(Path(name))
    reading.problem(
        f'"preset" is {shown(name)}: expects one of {quoted(LIBRARY_PRESETS)}, or a TOML file'
    )
    return {}


def _read_entry(
    reading: _Reading, entry: Any, options: LycorisOptions | None, where: str
) -> dict[str, Any]:
    """The options that an entry of a map changes."""
    if not isinstance(entry, dict):
        reading.problem(f"{where}expects an object with options, not {shown(entry)}")
        return {}
    entry = {key: value for key, value in entry.items() if value is not None}
    for key, own in _RUN_WORDS.items():
        if key in entry:
            reading.problem(f'{where}"{key}" is called "{own}" here')
            del entry[key]
    own_keys = reading.known(entry, _OF_ENTRY, where)
    base = {"algo": "lokr"} if options is None else options.model_dump()
    merged = reading.made(LycorisOptions, base | {k: entry[k] for k in own_keys}, {}, where)
    if merged is None:
        return {}
    _check_options(reading, merged, where)
    # the library takes 0 for what the run says
    return {
        key: getattr(merged, key) for key in own_keys if key not in ("dim", "alpha") or entry[key]
    }


def _check_options(reading: _Reading, options: LycorisOptions, where: str) -> None:
    """What can't go together in one algorithm."""
    if options.multiplier == 0:
        reading.problem(f'{where}"multiplier" is 0: nothing would be trained')
    elif options.multiplier != 1 and (
        options.algo in ("diag-oft", "boft")
        or (options.weight_decompose and options.algo != "lokr")
    ):
        reading.problem(
            f'{where}"multiplier" is {options.multiplier:g}: a file of {options.algo} has no place '
            "for it here; set it to 1"
        )
    if options.factor == 0:
        reading.problem(f'{where}"factor" is 0: expects -1, or a number from 1 on')
    if options.algo == "dylora" and options.dim % options.block_size:
        reading.problem(
            f"{where}dylora trains a rank in blocks: the rank, {options.dim}, must be a multiple "
            f'of "block_size", {options.block_size}'
        )
    if options.bypass_mode and options.algo in ("full", "dylora"):
        reading.problem(f'{where}"bypass_mode" is true, and {options.algo} has no such mode')
    if options.bypass_mode and options.weight_decompose:
        reading.problem(
            f'{where}"bypass_mode" never sees the changed weight, whose norms "dora_wd" needs: '
            "leave one of them out"
        )
    if options.weight_decompose and not options.wd_on_out and options.algo in ("lora", "locon"):
        reading.problem(f'{where}"wd_on_output" is false: files of LoRA have lengths of rows alone')
    if options.weight_decompose and options.algo not in ("lora", "locon", "loha", "lokr"):
        reading.problem(f'{where}"dora_wd" is true, and {options.algo} has no weight decomposition')


def _check_run(reading: _Reading, given: Mapping[str, Any], options: LycorisOptions | None) -> None:
    """What holds for the whole file: keys without effect, and what is not there."""
    if str(given.get("train_norm", False)).lower() != "false":
        reading.problem(
            '"train_norm" is true: the norms of FLUX.1 are RMS norms or have no weights, and '
            "lycoris-lora trains neither"
        )
    for key in ("conv_dim", "conv_alpha", "use_tucker"):
        if given.get(key):
            reading.notes.append(_no_effect(reading, key))
    for key in ("multiplier", "linear_alpha"):
        value = given.get(key)
        if isinstance(value, float) and value != int(value):
            reading.notes.append(
                f'{reading.path}: "{key}" is {value:g}, as written (SimpleTuner would cut it to '
                f"{int(value)})"
            )
    if options is not None and options.algo in ("loha", "lokr"):
        ignored = "rank_dropout" if options.bypass_mode else "dropout"
        if getattr(options, ignored):
            mode = "with" if options.bypass_mode else "without"
            reading.notes.append(
                f'{reading.path}: "{ignored}" has no effect {mode} "bypass_mode", as in '
                "lycoris-lora"
            )


def _no_effect(reading: _Reading, key: str) -> str:
    return f'{reading.path}: "{key}" has no effect: {_WITHOUT_EFFECT[key]}'
