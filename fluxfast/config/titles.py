"""What a run is called that has no name: in its LoRA's metadata, its trackers and on the Hub."""

import os
from pathlib import Path

from fluxfast.text import printable

# names of folders that say nothing of what is in them
_SAYS_NOTHING = {
    "checkpoints", "fluxfast", "lora", "loras", "model", "models", "out", "output", "outputs",
    "result", "results", "run", "runs", "simpletuner-results", "train", "training",
}  # fmt: skip
# of the folder's own path, how many names from its end may be the run's
_NAMES = 3
_LONGEST = 60


def title_of(output_dir: Path, instance_prompt: str | None) -> str:
    """The output folder's name; where that says nothing, the instance prompt, or a folder above."""
    folder = Path(os.path.normpath(output_dir.expanduser().absolute()))
    if _says_something(folder):
        return folder.name
    if instance_prompt and instance_prompt.strip():
        return " ".join(printable(instance_prompt).split())[:_LONGEST].strip()
    above = [each for each in (folder, *folder.parents)[1:_NAMES] if _says_something(each)]
    return above[0].name if above else "flux-lora"


def _says_something(folder: Path) -> bool:
    return folder.name.lower() not in {"", *_SAYS_NOTHING} and folder != Path.home()
