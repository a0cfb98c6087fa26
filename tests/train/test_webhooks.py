"""Webhooks against a real server on this machine, which is slow, dead, angry, or hangs up."""

import base64
import email
import json
import threading
from contextlib import ExitStack
from email.policy import HTTP

import pytest
from webhook_server import LONG, SECRET, Server, answers, hangs_up, speak_tls

from fluxfast.config.reporting_fields import Webhook
from fluxfast.train import webhooks
from fluxfast.train.run_events import RunEvents
from fluxfast.train.webhooks import Webhooks


class Told(list):
    """What was said; `wait_for` blocks until so many lines were."""

    def __init__(self):
        super().__init__()
        self.changed = threading.Condition()

    def __call__(self, line):
        with self.changed:
            self.append(line)
            self.changed.notify_all()

    def wait_for(self, number):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self) >= number, LONG), list(self)


@pytest.fixture
def connect(tmp_path):
    """Events whose listener is a webhook to a server: (events, webhooks, what was said)."""
    stack = ExitStack()

    def build(url, kind="raw", timeout=LONG, capacity=64, status_interval=None, **keys):
        key = {"raw": "callback_url", "discord": "webhook_url"}[kind]
        hook = Webhook.model_validate({"webhook_type": kind, key: url, **keys})
        told = Told()
        hooks = Webhooks(
            [hook], told, capacity=capacity, timeout=timeout, status_interval=status_interval
        )
        stack.callback(hooks.close, 0)
        events = stack.enter_context(RunEvents(tmp_path, told))
        events.subscribe(hooks)
        return events, hooks, told

    with stack:
        yield build


def status(events, step):
    """What a step of training announces."""
    events.emit("training.status", text=f"step {step}", progress={"current": step})


def steps_in(posts):
    return [json.loads(body)["progress"]["current"] for _, body in posts]


def test_a_raw_webhook_gets_events_as_json(server, connect):
    events, hooks, told = connect(server.url, auth_token=SECRET, message_prefix="[mine]")
    with events.stage("checkpoint_save"):
        pass
    events.emit("validation.image", images=[b"png", b"another"], title="Validation: cup")
    hooks.close(LONG)
    (headers, first), (_, second), (_, third) = server.posts
    assert headers["Content-Type"] == "application/json" and headers["X-API-Key"] == SECRET
    first, second, third = map(json.loads, (first, second, third))
    assert first["type"] == "lifecycle.stage" and first["severity"] == "info"
    assert first["job_id"] == second["job_id"] == events.job_id
    assert first["stage"]["key"] == "checkpoint_save" and first["stage"]["status"] == "running"
    assert first["message"] == "[mine] Saving a checkpoint" and first["images"] == []
    assert second["stage"]["status"] == "completed" and "timestamp" in second
    assert [base64.b64decode(image) for image in third["images"]] == [b"png", b"another"]
    assert not told


def parts_of(headers, body):
    """(name, file's name, content) of each part of a form."""
    whole = b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body
    return [
        (p.get_param("name", header="Content-Disposition"), p.get_filename(), p.get_content())
        for p in email.message_from_bytes(whole, policy=HTTP).iter_parts()
    ]


def test_discord_gets_lines_and_pictures_in_several_posts(server, connect, monkeypatch):
    monkeypatch.setattr(webhooks, "DISCORD_BYTES", 50)
    events, hooks, _ = connect(server.url, "discord", message_prefix="[mine]")
    events.emit("training.status", progress={"current": 1})
    images = [bytes([i]) for i in range(23)] + [b"x" * 40, b"y" * 40]
    events.emit("validation.image", images=images, text="a cup")
    events.emit("training.checkpoint", text="x" * 3000)
    hooks.close(LONG)
    *pictures, last = [(headers, body) for headers, body in server.posts]
    forms = [parts_of(*post) for post in pictures]
    assert forms[0][0] == ("content", None, "[mine] a cup")
    files = [[part for part in form if part[1]] for form in forms]
    assert [len(each) for each in files] == [10, 10, 4, 1]
    assert [image for each in files for _, _, image in each] == images
    assert files[0][3][:2] == ("file3", "image_3.png")
    assert not any(name == "content" for form in forms[1:] for name, _, _ in form)
    assert last[1] == b"content=%5Bmine%5D+" + b"x" * (2000 - len("[mine] "))


def test_severity_is_a_filter(server, connect):
    events, hooks, _ = connect(server.url, log_level="warning")
    for severity in ("debug", "info", "warning", "error", "critical"):
        events.emit("error", severity=severity, title=severity)
    hooks.close(LONG)
    assert [json.loads(body)["title"] for _, body in server.posts] == [
        "warning", "error", "critical",
    ]  # fmt: skip


def test_reports_of_progress_come_at_their_interval(server, connect):
    events, hooks, _ = connect(server.url, status_interval=3)
    for step in range(1, 8):
        status(events, step)
    events.emit("training.checkpoint", text="saved", progress={"current": 1})
    hooks.close(LONG)
    assert steps_in(server.posts) == [3, 6, 1]


@pytest.mark.parametrize(("interval", "lines"), [(None, []), (2, ["step+2", "step+4"])])
def test_discord_gets_reports_of_progress_on_request(server, connect, interval, lines):
    events, hooks, _ = connect(server.url, "discord", status_interval=interval)
    for step in (1, 2, 3, 4):
        status(events, step)
    events.emit("training.status", text="finished", data={"status": "completed"})
    hooks.close(LONG)
    expected = [f"content={line}".encode() for line in [*lines, "finished"]]
    assert [body for _, body in server.posts] == expected


def test_a_slow_server_makes_nobody_wait_and_loses_reports_of_progress_alone(server, connect):
    """The server answers nothing before training has ended, and gets the newest events then."""
    trained = threading.Event()

    def answer(handler):
        assert trained.wait(LONG)
        answers(204)(handler)

    server.answer = answer
    events, hooks, told = connect(server.url, capacity=4)
    events.emit("training.checkpoint", text="saved", progress={"current": 0})
    server.wait_for(1)
    for step in range(1, 101):
        if step == 50:
            events.emit("training.checkpoint", text="saved", progress={"current": 50})
        status(events, step)
    trained.set()
    hooks.close(LONG)
    assert steps_in(server.posts) == [0, 50, 98, 99, 100]
    assert len(told) == 1 and "more slowly" in told[0] and "dropped" in told[0]


def test_the_oldest_event_goes_where_there_is_no_report_of_progress(server, connect, monkeypatch):
    monkeypatch.setattr(webhooks, "CAPACITY_BYTES", 10)
    trained = threading.Event()
    server.answer = lambda handler: (trained.wait(LONG), answers(204)(handler))
    events, hooks, _ = connect(server.url, capacity=3)
    events.emit("error", title="first")
    server.wait_for(1)
    for title in "abcd":
        events.emit("error", title=title)
    for title in "ef":
        events.emit("validation.image", title=title, images=[b"x" * 9])
    trained.set()
    hooks.close(LONG)
    assert [json.loads(body)["title"] for _, body in server.posts] == ["first", "f"]


def test_certificates_are_checked_unless_the_config_says_otherwise(server, connect, tmp_path):
    url = speak_tls(server, tmp_path)
    events, hooks, told = connect(url)
    status(events, 1)
    hooks.close(LONG)
    assert not server.posts and len(told) == 1
    assert "certificate that is not trusted" in told[0] and SECRET not in told[0]
    events, hooks, told = connect(url, ssl_no_verify=True)
    status(events, 2)
    hooks.close(LONG)
    assert steps_in(server.posts) == [2] and not told


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (answers(500), "answers 500"),
        (answers(302, Location="http://127.0.0.1:9/elsewhere"), "answers 302"),
        (hangs_up, "can't be reached, or hangs up"),
    ],
    ids=["500", "redirect", "hangs up"],
)
def test_a_server_that_fails_is_told_once_and_tried_again(server, connect, answer, problem):
    server.answer = answer
    events, hooks, told = connect(server.url)
    for step in (1, 2, 3):
        status(events, step)
    server.wait_for(3)
    told.wait_for(1)
    server.answer = answers(204)
    status(events, 4)
    hooks.close(LONG)
    assert steps_in(server.posts)[-1] == 4
    assert len(told) == 1 and problem in told[0] and "127.0.0.1" in told[0]
    assert SECRET not in told[0] and str(server.server_port) not in told[0]


def test_a_server_that_is_killed_midway_and_comes_back(server, connect):
    events, hooks, told = connect(server.url)
    status(events, 1)
    server.wait_for(1)
    port = server.server_port
    server.stop()
    status(events, 2)
    told.wait_for(1)
    status(events, 3)
    assert "can't be reached" in told[0] and SECRET not in told[0]
    with Server(port) as again:
        status(events, 4)
        assert steps_in(again.wait_for(1))[-1] in (3, 4)
        hooks.close(LONG)
        assert steps_in(again.posts)[-1] == 4


def test_a_server_that_never_answers_is_given_up(server, connect):
    released = threading.Event()
    server.answer = lambda handler: released.wait(LONG)
    events, _, told = connect(server.url, timeout=0.05)
    status(events, 1)
    told.wait_for(1)
    assert "does not answer within 0.05 s" in told[0] and SECRET not in told[0]
    released.set()


def test_the_end_of_a_run_does_not_wait_for_a_server_that_never_answers(server, connect):
    released = threading.Event()
    server.answer = lambda handler: released.wait(LONG)
    events, hooks, told = connect(server.url)
    for step in (1, 2, 3):
        status(events, step)
    server.wait_for(1)
    hooks.close(0)
    assert told == ["the webhook at 127.0.0.1 did not take the last 3 events in time"]
    # nothing is taken any more, and nobody fails by it
    status(events, 4)
    assert len(told) == 1
    released.set()


def test_a_pause_that_is_asked_for_is_kept(server, connect, monkeypatch):
    monkeypatch.setattr(webhooks, "LONGEST_PAUSE", 0.01)

    def answer(handler):
        server.answer = answers(204)
        answers(429, Retry_After="3600")(handler)

    server.answer = answer
    events, hooks, told = connect(server.url)
    status(events, 1)
    status(events, 2)
    hooks.close(LONG)
    assert steps_in(server.posts) == [1, 1, 2] and not told


def test_the_end_does_not_wait_for_a_pause(server, connect, monkeypatch):
    monkeypatch.setattr(webhooks, "LONGEST_PAUSE", LONG)
    server.answer = answers(429, Retry_After=str(LONG))
    events, hooks, told = connect(server.url)
    status(events, 1)
    server.wait_for(1)
    hooks.close(0)
    # the pause has not ended, or the post would have been repeated
    assert len(server.posts) == 1 and "did not take the last 1 events" in told[0]


def test_an_event_that_is_no_json_is_told_without_its_content(server, connect):
    events, hooks, told = connect(server.url)
    events.emit("error", title={1, 2})
    hooks.close(LONG)
    assert any("gets nothing: " in line for line in told) and not server.posts


def test_two_webhooks_do_not_wait_for_each_other(server, tmp_path):
    released = threading.Event()
    server.answer = lambda handler: (released.wait(LONG), answers(204)(handler))

    def hook(to):
        return Webhook.model_validate({"webhook_type": "raw", "callback_url": to.url})

    with (
        Server() as other,
        Webhooks([hook(server), hook(other)], print) as hooks,
        RunEvents(tmp_path, print) as events,
    ):
        events.subscribe(hooks)
        for step in range(5):
            status(events, step)
        assert steps_in(other.wait_for(5)) == [0, 1, 2, 3, 4] and len(server.posts) <= 1
        released.set()
        hooks.close(LONG)
        assert len(server.posts) == 5
