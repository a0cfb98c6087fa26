"""What a run leaves for others: its record, its report, and its uploads to the Hub.

None of it stops a run: a failure is told once, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fluxfast.config.run import TrainConfig
from fluxfast.train.events import Numbers
from fluxfast.train.hub import HubUploads
from fluxfast.train.hub_folder import gather
from fluxfast.train.run_record import RECORD_NAME, write_run_record


class Publisher:
    """Writes and uploads at the moments of a run that its methods are named after.

    repository: the Hub's, as `hub.check_access` gives it; "" where nothing is uploaded.
    record: the run's (`run_record`).
    """

    def __init__(
        self,
        config: TrainConfig,
        repository: str,
        record: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._record = config, record
        self._guard = Numbers(say).guard
        self._uploads: HubUploads | None = None
        if repository:
            self._uploads = HubUploads(
                repository,
                private=config.model_card_private,
                background=config.push_to_hub_background,
                say=say,
            )

    def start(self, step: int) -> None:
        """The run begins after so many steps, 0 for a new one."""
        with self._guard(RECORD_NAME):
            write_run_record(self._config.output_dir, self._record, step=step)

    def checkpoint(self, folder: Path, step: int) -> None:
        """A checkpoint has been saved, which is not the run's last."""
        if self._config.push_checkpoints_to_hub:
            self._upload(folder, step, f"checkpoint of step {step}")

    def end(self, step: int) -> None:
        """The adapter has been saved in the output folder."""
        self._upload(self._config.output_dir, step, f"adapter after {step} steps")

    def close(self) -> None:
        """Wait for uploads that are under way."""
        if self._uploads is not None:
            self._uploads.close()

    def _upload(self, source: Path, step: int, message: str) -> None:
        if self._uploads is None:
            return
        with self._guard("push_to_hub"):
            repository = self._uploads.repository
            folder = gather(self._config, self._record, source, repository=repository, step=step)
            self._uploads.upload(folder, message)
