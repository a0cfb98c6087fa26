"""Sends a run's events to webhooks: to Discord for people, or as JSON for programs.

Each webhook has a thread and a queue of its own. A run neither waits for a server nor ends by one:
what a dead or slow server does not take is told once and dropped. An address is a secret, since
whoever knows Discord's can write there; messages show its host alone.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import requests
import urllib3

from fluxfast.config.reporting_fields import Webhook
from fluxfast.config.run import TrainConfig
from fluxfast.train.run_events import Event

# seconds that a server may take to connect and between two pieces of its answer
TIMEOUT = 5.0
# events that wait for a server, and bytes of their pictures
CAPACITY, CAPACITY_BYTES = 64, 64 * 2**20
# what Discord takes in a post: characters, files, and bytes of all its files
DISCORD_CHARACTERS, DISCORD_FILES, DISCORD_BYTES = 2000, 10, 8 * 2**20
# seconds to wait at most where a server asks for a pause
LONGEST_PAUSE = 30.0
STATUS = "training.status"
_SEVERITIES = ("debug", "info", "warning", "error", "critical")


class Webhooks:
    """A listener of `RunEvents` that sends each event to every webhook that wants it.

    As a context, it gives the servers a few seconds at its end to take what is left.
    """

    def __init__(
        self,
        webhooks: Sequence[Webhook],
        say: Callable[[str], None],
        *,
        status_interval: int | None = None,
        capacity: int = CAPACITY,
        timeout: float = TIMEOUT,
    ) -> None:
        """status_interval: steps between the reports of progress that are sent; None: of every
        step, but to Discord none, whose readers they would drown.
        """
        self._senders = [
            _Sender(each, say, status_interval, capacity, timeout) for each in webhooks
        ]

    def __call__(self, event: Event) -> None:
        """Queue an event; returns at once."""
        for sender in self._senders:
            sender.put(event)

    def __enter__(self) -> Webhooks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self, timeout: float = 5.0) -> None:
        """Give the servers so many seconds, all together, to take what still waits for them."""
        deadline = time.monotonic() + timeout
        for sender in self._senders:
            sender.finish()
        for sender in self._senders:
            sender.join(deadline)


def webhooks_of(config: TrainConfig, say: Callable[[str], None]) -> Webhooks:
    """The webhooks that a config names, if any."""
    interval = config.webhook_reporting_interval
    return Webhooks(config.webhook_config or (), say, status_interval=interval)


class _Sender:
    """Posts the events of one webhook, one after the other."""

    def __init__(
        self,
        webhook: Webhook,
        say: Callable[[str], None],
        status_interval: int | None,
        capacity: int,
        timeout: float,
    ) -> None:
        self._webhook, self._timeout, self._capacity = webhook, timeout, capacity
        self._is_discord = webhook.webhook_type == "discord"
        self._status_interval = status_interval or (0 if self._is_discord else 1)
        self._tell, self._told = say, set[str]()
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._finishing = self._abandoned = False
        if webhook.ssl_no_verify:
            # the config asks for it; a warning at each post would fill the terminal
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        name = f"webhook to {webhook.host}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _wants(self, event: Event) -> bool:
        if _SEVERITIES.index(event.severity) < _SEVERITIES.index(self._webhook.log_level):
            return False
        if event.type == STATUS and (progress := event.content.get("progress")):
            interval = self._status_interval
            return interval > 0 and progress.get("current", 0) % interval == 0
        # Discord's readers need no event that says nothing to people
        return not self._is_discord or bool(event.text or event.images)

    def put(self, event: Event) -> None:
        """Queue an event that the webhook wants, in place of older ones where it is too slow."""
        if not self._wants(event):
            return
        with self._changed:
            if self._finishing:
                return
            self._queue.append(event)
            is_full = self._drop_what_is_too_much()
            self._changed.notify()
        if is_full:
            self._say(
                f"takes events more slowly than they happen: where more than {self._capacity} "
                "wait, some are dropped, reports of progress first"
            )

    def _drop_what_is_too_much(self) -> bool:
        """Let the oldest reports of progress go, then the oldest events; returns if any went."""
        dropped = False
        while len(self._queue) > 1 and (
            len(self._queue) > self._capacity
            or sum(len(image) for each in self._queue for image in each.images) > CAPACITY_BYTES
        ):
            oldest = next((i for i, each in enumerate(self._queue) if each.type == STATUS), 0)
            del self._queue[oldest]
            dropped = True
        return dropped

    def finish(self) -> None:
        """Take no further events."""
        with self._changed:
            self._finishing = True
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the rest to be posted, until a time of `time.monotonic`; tell what is left."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            left = len(self._queue) + self._thread.is_alive()
            self._abandoned = True
            self._queue.clear()
            self._changed.notify()
        if left:
            self._say(f"did not take the last {left} events in time")

    def _say(self, problem: str) -> None:
        """Tell a problem the first time that it happens."""
        if problem not in self._told:
            self._told.add(problem)
            self._tell(f"the webhook at {self._webhook.host} {problem}")

    def _run(self) -> None:
        while (event := self._next()) is not None:
            try:
                for arguments in _posts(self._webhook, event):
                    self._post(arguments)
            # no failure here is worth a run; its message may hold the address
            except Exception as error:
                self._say(f"{_reason(error, self._timeout)}; later events are sent all the same")

    def _next(self) -> Event | None:
        """The event to post, once there is one; None where nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._finishing)
            return self._queue.popleft() if self._queue else None

    def _post(self, arguments: dict[str, Any]) -> None:
        status = self._answer(arguments)
        if status == requests.codes.too_many_requests:
            status = self._answer(arguments)
        if status >= 300:
            raise _Refused(status)

    def _answer(self, arguments: dict[str, Any]) -> int:
        """Post once, and wait as long as the server asks for; returns its status."""
        token = self._webhook.auth_token
        with requests.post(
            self._webhook.url,
            headers={"X-API-Key": token.get_secret_value()} if token else None,
            timeout=self._timeout,
            verify=not self._webhook.ssl_no_verify,
            # another host would get the token and what is sent
            allow_redirects=False,
            # the answer is of no use, however long it is
            stream=True,
            **arguments,
        ) as response:
            if response.status_code == requests.codes.too_many_requests:
                self._pause(response.headers.get("Retry-After", ""))
            return response.status_code

    def _pause(self, asked: str) -> None:
        try:
            seconds = float(asked)
        except ValueError:
            # it may be a date
            seconds = 1.0
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, min(max(seconds, 0.0), LONGEST_PAUSE))


class _Refused(Exception):
    """A server answered a post with a status that is no success."""


def _reason(error: Exception, timeout: float) -> str:
    """What went wrong, in words that hold no part of the address but its host."""
    if isinstance(error, _Refused):
        return f"answers {error}"
    if isinstance(error, requests.exceptions.SSLError):
        return "has a certificate that is not trusted"
    if isinstance(error, requests.Timeout):
        return f"does not answer within {timeout:g} s"
    if isinstance(error, requests.ConnectionError):
        return "can't be reached, or hangs up"
    return f"gets nothing: {type(error).__name__}"


def _posts(webhook: Webhook, event: Event) -> Iterator[dict[str, Any]]:
    """The arguments of each post that an event makes."""
    text = f"{webhook.message_prefix} {event.text}".strip() if event.text else ""
    if webhook.webhook_type == "raw":
        images = [base64.b64encode(image).decode() for image in event.images]
        yield {"json": {**event.content, "message": text, "images": images}}
        return
    files = _files_of_posts(event.images)
    first = next(files, None)
    for batch in chain([first], files):
        content = {"content": text[:DISCORD_CHARACTERS]} if batch is first and text else {}
        named = {
            f"file{i}": (f"image_{i}.png", image, "image/png")
            for i, image in enumerate(batch or ())
        }
        yield {"data": content, "files": named or None}


def _files_of_posts(images: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Images in as few posts as Discord takes them in."""
    batch: list[bytes] = []
    for image in images:
        is_full = len(batch) == DISCORD_FILES
        if batch and (is_full or sum(map(len, batch)) + len(image) > DISCORD_BYTES):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch
