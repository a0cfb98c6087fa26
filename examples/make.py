"""Make an example: draw its data, train on the toy base, draw the picture of what came out.

    python examples/make.py masked-loss
    python examples/make.py kontext /tmp/kontext --max_train_steps=50

FOLDER then has the example's configs with all that they name, so that `fluxfast-train config.json`
trains it again in there. Options of a config count for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from making import kontext, lokr, masked_loss, regularisation
from making.runs import prepare, run, write_data, write_without
from making.studio import Studio
from rich.console import Console

from fluxfast.cli.arguments import CommandLine
from fluxfast.demo import BASE
from fluxfast.files import atomic_file, write_atomic

EXAMPLES = {
    "kontext": kontext.EXAMPLE,
    "lokr": lokr.EXAMPLE,
    "masked-loss": masked_loss.EXAMPLE,
    "regularisation": regularisation.EXAMPLE,
}


def main() -> int:
    parser = CommandLine(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=EXAMPLES, help="the example")
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder to write (fluxfast-examples/NAME)"
    )
    parser.add_argument(
        "--base", type=Path, default=BASE, help="another pipeline than the toy base"
    )
    parser.add_argument("--pictures", type=int, help="training pictures (the example's own number)")
    parser.add_argument(
        "--asked", type=int, default=32, help="images that the numbers come from (%(default)s)"
    )
    arguments, options = parser.parse_beside_config(None)
    example, began = EXAMPLES[arguments.name], time.monotonic()
    folder = arguments.folder or Path("fluxfast-examples") / arguments.name
    try:
        prepare(Path(__file__).parent / arguments.name, folder, arguments.base)
    except ValueError as error:
        parser.error(str(error))
    # the configs' paths start in the folder
    os.chdir(folder)
    console = Console()
    write_data(example.data(arguments.pictures or example.pictures), console)
    if example.is_left_out is not None:
        write_without(example.is_left_out)
    if (status := run(example.runs, options)) != 0:
        return status
    picture, numbers = example.report(Studio(console), arguments.asked)
    with atomic_file(Path("picture.png")) as stream:
        picture.save(stream, format="PNG", optimize=True)
    numbers["seconds"] = round(time.monotonic() - began)
    text = json.dumps(numbers, indent=2)
    write_atomic(Path("numbers.json"), text.encode())
    print(f"{text}\npicture: {Path('picture.png').absolute()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
