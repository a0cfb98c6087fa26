"""`fluxfast-train demo`: teach a toy base something new, and show what came of it.

Training is the same as any run's. Before and after it the model is asked the same questions
(`fluxfast/demo/exam.py`), and `demo.png` has the answers side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.complain import complain
from fluxfast.config.run import TrainConfig, load_config
from fluxfast.config.settings import ConfigError
from fluxfast.demo.folder import STEPS, write_configs, write_data
from fluxfast.demo.tasks import TASKS
from fluxfast.text import printable

# what the demo's own questions and pictures are about
_OWN = ("model_type", "pretrained_model_name_or_path", "data_backend_config", "output_dir")


def main(words: Sequence[str]) -> int:
    began = time.monotonic()
    parser = CommandLine(
        "fluxfast-train demo",
        description=(
            "Teach a toy base, a small FLUX.1-shaped model, something new from sixteen pictures, "
            "and show what came of it: no network, no GPU, no account, two minutes on two cores. "
            "Options of a config work here as well, such as --lora_rank=8."
        ),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="subject",
        help=f"what to teach: {'; '.join(f'{t.name}: {t.title}' for t in TASKS.values())} "
        "(%(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("fluxfast-demo"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--max-train-steps",
        "--max_train_steps",
        type=int,
        default=STEPS,
        help="steps to train (%(default)s)",
    )
    arguments, options = parser.parse_beside_config(words)
    if arguments.max_train_steps < 1:
        parser.error(f"--max-train-steps {arguments.max_train_steps}: expected at least 1")
    root, task = arguments.output.resolve(), TASKS[arguments.task]
    config = write_configs(root, arguments.max_train_steps, task.name)
    try:
        _check_own(load_config(config), load_config(config, options))
    except ConfigError as error:
        complain(error)
        return 2
    print(f"teaching a toy base {task.title}, in {printable(config.parent)}", flush=True)
    write_data(root, task)
    # the libraries of models take seconds to import; `--help` doesn't need them
    from rich.console import Console

    from fluxfast.cli import train
    from fluxfast.demo.lesson import Lesson

    lesson = Lesson(root, task, Console(), began=began)
    if (told := lesson.result()) is None:
        lesson.ask_base()
    status = train.main([str(config), *options])
    if status == 0:
        found = lesson.result() or lesson.ask_lora()
        if found == told:
            print(f"The demo: `--output DIR` starts another, as does removing {config.parent}")
        lesson.show(found)
    return status


def _check_own(own: TrainConfig, asked: TrainConfig) -> None:
    """Raise ConfigError where options change what is the demo's own."""
    changed = [key for key in _OWN if getattr(own, key) != getattr(asked, key)]
    if changed:
        raise ConfigError(
            [
                f'"{key}" is the demo\'s own: leave it out; `--output DIR` puts the demo '
                "elsewhere, and `fluxfast-train CONFIG.json` trains what you like"
                for key in changed
            ]
        )
