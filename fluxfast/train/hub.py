"""Uploads to the Hugging Face Hub, which neither stop a run nor lose what it has trained.

One thread uploads one folder after the other. Where several wait, the newest goes and the others
are left out, since it holds what they hold. Each is tried three times. A failure is told, and the
files of the run stay where they are.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars

from fluxfast.config.hub_fields import repository_name
from fluxfast.config.public import redact
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError

# seconds before each try
WAITS = (0.0, 5.0, 30.0)
# seconds without a sign of life after which a request has failed; the client's own has no end
_SILENCE = 120.0
# seconds between two lines that say what is waited for
_TOLD_EVERY = 30.0
_SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN to a token that may write"


class _Upload(NamedTuple):
    folder: Path
    message: str


class HubUploads:
    """Uploads folders to a repository, which is made before the first of them.

    background: whether `upload` returns at once; else it returns when the upload is over.
    """

    def __init__(
        self,
        repository: str,
        *,
        private: bool,
        background: bool,
        say: Callable[[str], None],
        waits: Sequence[float] = WAITS,
    ) -> None:
        self.repository = repository
        self._private, self._background = private, background
        self._say, self._waits = say, waits
        self._made = False
        self._changed = threading.Condition()
        self._queued: _Upload | None = None
        self._running: _Upload | None = None
        self._closing = self._given_up = False
        self._thread: threading.Thread | None = None
        disable_progress_bars()

    def upload(self, folder: Path, message: str) -> None:
        """Upload what a folder holds, and remove the folder; `message` is the commit's."""
        with self._changed:
            left_out, self._queued = self._queued, _Upload(folder, message)
            if self._thread is None:
                # a daemon, so that a second interrupt ends the program in the middle of an upload
                self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if left_out is not None:
            shutil.rmtree(left_out.folder, ignore_errors=True)
            self._say(f"{left_out.message}: not uploaded, {message} is newer")
        if not self._background:
            self._wait()

    def close(self) -> None:
        """Wait for what is under way and what waits; later uploads are not possible.

        Where an interrupt has ended a wait, there is no other one.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            if (busy := self._running or self._queued) is not None and not self._given_up:
                self._say(
                    f"{busy.message}: waiting for the upload to {self.repository} (an interrupt "
                    "leaves it undone)"
                )
        self._wait()

    def _wait(self) -> None:
        try:
            with self._changed:
                while not self._given_up and (busy := self._running or self._queued) is not None:
                    if not self._changed.wait(_TOLD_EVERY):
                        self._say(f"{busy.message}: still uploading to {self.repository}")
        except KeyboardInterrupt:
            self._given_up = True
            raise

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queued is not None or self._closing)
                if self._queued is None or self._given_up:
                    return
                self._running, self._queued = self._queued, None
                upload = self._running
            try:
                self._try(upload)
            finally:
                shutil.rmtree(upload.folder, ignore_errors=True)
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _try(self, upload: _Upload) -> None:
        for number, wait in enumerate(self._waits, 1):
            time.sleep(wait)
            try:
                self._put(upload)
                self._say(f"{upload.message}: uploaded to {self.repository}")
                return
            # the client raises its HTTP library's errors, the disk's, and those of its own
            except Exception as error:
                if number < len(self._waits) and _may_pass(error):
                    continue
                self._say(
                    f"{upload.message}: not uploaded to {self.repository} after {number} "
                    f"{'try' if number == 1 else 'tries'} ({_told(error)}); the run goes on, and "
                    "its files stay where they are"
                )
                return

    def _put(self, upload: _Upload) -> None:
        api = HfApi()
        get_session().timeout = _SILENCE
        if not self._made:
            made = api.create_repo(self.repository, private=self._private, exist_ok=True)
            self.repository, self._made = made.repo_id, True
        api.upload_folder(
            repo_id=self.repository, folder_path=upload.folder, commit_message=upload.message
        )


def check_access(config: TrainConfig, notes: list[str]) -> str:
    """The repository that the run uploads to, owner/name, once the Hub says that it may write.

    A Hub that does not answer is a line in `notes`. Raises ConfigError where there is no token, or
    one that may not write there.
    """
    name = config.hub_model_id or repository_name(config.tracker_project_name)
    get_session().timeout = _SILENCE
    try:
        known = HfApi().whoami()
        repository = name if "/" in name else f"{known['name']}/{name}"
        _check_token(known, repository)
        if config.model_card_private and _is_public(repository):
            notes.append(
                f'{repository} is public already: "model_card_private" makes only a new '
                "repository a private one"
            )
        return repository
    except LocalTokenNotFoundError:
        raise ConfigError([f'"push_to_hub": there is no token for the Hub: {_SIGN_IN}']) from None
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and not _may_pass(error):
            raise ConfigError(
                [f'"push_to_hub": the Hub refuses the token ({_told(error)}): {_SIGN_IN}']
            ) from None
        notes.append(
            f'"push_to_hub": the Hub does not answer ({_told(error)}), so that nobody has checked '
            "the token; uploads are tried all the same"
        )
        return name


def _check_token(known: dict[str, Any], repository: str) -> None:
    """ConfigError where an account's token may not write to a repository."""
    owner = repository.partition("/")[0]
    owners = [known["name"], *(each["name"] for each in known.get("orgs", []))]
    token = known.get("auth", {}).get("accessToken", {})
    granted = token.get("fineGrained", {})
    rights = {
        right
        for scope in granted.get("scoped", [])
        if scope.get("entity", {}).get("name") in (owner, repository)
        for right in scope.get("permissions", [])
    }
    problem = ""
    if token.get("role") == "read":
        problem = f"the token of {known['name']} may only read"
    elif owner not in owners and not rights:
        problem = f"{known['name']} is not {owner} and no member of it"
    elif token.get("role") == "fineGrained" and "repo.write" not in rights:
        problem = f"the token of {known['name']} may not write to repositories of {owner}"
    if problem:
        raise ConfigError([f'"push_to_hub": {problem}: {_SIGN_IN}, or change "hub_model_id"'])


def _is_public(repository: str) -> bool:
    try:
        return not HfApi().model_info(repository).private
    # it is not there yet, or the Hub can't say
    except HfHubHTTPError:
        return False


def _may_pass(error: Exception) -> bool:
    """Whether another try may go well: not after a refusal, nor where a file has gone."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 409, 412, 429) or (
            error.response.status_code >= 500
        )
    return not isinstance(error, FileNotFoundError)


def _told(error: Exception) -> str:
    """An error in one line without the paths and tokens that a client may put in it."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return redact(lines[0])[:200]
