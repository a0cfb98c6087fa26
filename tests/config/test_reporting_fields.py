"""Trackers and webhooks in a config."""

import json
from pathlib import Path

import pytest

from config_helpers import load, only, refused
from fluxfast.config import reporting_fields
from fluxfast.config.reporting_fields import Webhook

DISCORD = {"webhook_type": "discord", "webhook_url": "https://discord.test/api/webhooks/7/hush"}
RAW = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:8001/hush", "auth_token": "hush"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "trackers"),
    [
        ("none", ()),
        ("", ()),
        ([], ()),
        ("tensorboard", ("tensorboard",)),
        ("wandb", ("wandb",)),
        ("TensorBoard, wandb", ("tensorboard", "wandb")),
        (["wandb", "tensorboard", "wandb"], ("wandb", "tensorboard")),
        ("all", ("tensorboard", "wandb")),
    ],
)
def test_trackers(written, trackers):
    assert load(report_to=written).trackers == trackers


@pytest.mark.parametrize("name", ["swanlab", "comet_ml", "custom-tracker", "simpletuner"])
def test_trackers_that_are_missing_are_refused_by_name(name):
    for written in (name, f"tensorboard,{name}", ["wandb", name]):
        only(refused(report_to=written), '"report_to"', f"{name} is not implemented yet")


def test_other_words_are_no_trackers():
    only(refused(report_to="tensorbored"), "there is no tracker", "tensorbored")
    only(refused(report_to="all,wandb"), "stand alone")
    only(refused(report_to=[3]), "names of trackers")


def test_a_tracker_without_its_package(monkeypatch):
    monkeypatch.setattr(reporting_fields, "find_spec", lambda name: None)
    assert load(report_to="all").trackers == ()
    monkeypatch.setattr("fluxfast.config.rules.is_installed", lambda name: name != "wandb")
    only(refused(report_to="wandb"), "not installed", 'pip install "fluxfast[wandb]"')


def test_a_folder_of_runs_is_no_package(monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("runs_of_a_tracker").mkdir()
    assert not reporting_fields.is_installed("runs_of_a_tracker")


def test_the_layout_of_images_belongs_to_wandb():
    assert load(report_to="wandb", tracker_image_layout="table").tracker_image_layout == "table"
    notes = load(report_to="tensorboard", tracker_image_layout="table").notes
    assert sum('"tracker_image_layout" has no effect' in note for note in notes) == 1


@pytest.mark.parametrize("form", ["object", "list", "text", "file", "list in a file"])
def test_forms_of_webhooks(form, monkeypatch):
    monkeypatch.setenv("HOOK_TOKEN", "hush")
    in_file = RAW | {"auth_token": "{env:HOOK_TOKEN}"}
    Path("hooks.json").write_text(json.dumps([in_file] if "list" in form else in_file))
    value = {"object": RAW, "list": [RAW], "text": json.dumps(RAW)}.get(form, "hooks.json")
    (webhook,) = load(webhook_config=value).webhook_config
    assert (webhook.url, webhook.host, webhook.log_level) == (
        RAW["callback_url"], "127.0.0.1", "info",
    )  # fmt: skip
    assert webhook.auth_token.get_secret_value() == "hush"


def test_several_webhooks():
    both = load(webhook_config=[DISCORD, RAW | {"log_level": "error", "ssl_no_verify": "true"}])
    assert [hook.host for hook in both.webhook_config] == ["discord.test", "127.0.0.1"]
    assert both.webhook_config[1].ssl_no_verify and both.webhook_config[1].log_level == "error"
    assert load(webhook_config=RAW, webhook_reporting_interval=5).webhook_reporting_interval == 5
    notes = load(webhook_reporting_interval=5).notes
    assert sum('"webhook_reporting_interval" has no effect' in note for note in notes) == 1


WRONG = {
    "no type": ({"callback_url": "http://host/hush"}, "webhook_config.0.webhook_type"),
    "another type": (RAW | {"webhook_type": "slack"}, "'discord' or 'raw'"),
    "no address": ({"webhook_type": "discord", "callback_url": "http://host/hush"}, "webhook_url"),
    "no web address": (RAW | {"callback_url": "ftp://host/hush"}, "begins with http://"),
    "no host": (RAW | {"callback_url": "http://:8000/hush"}, "begins with http://"),
    "no port": (RAW | {"callback_url": "http://host:hush/"}, "begins with http://"),
    "an unknown key": (RAW | {"retries": "hush"}, "webhook_config.0.retries"),
    "no header": (RAW | {"auth_token": "hush\nX: y"}, "auth_token"),
    "a secret that is a list": (RAW | {"auth_token": ["hush"]}, "auth_token"),
    "a level": (RAW | {"log_level": "hush"}, "log_level"),
    "no webhook": (["hush"], "webhook_config.0"),
    "a text that is no JSON": ('{"callback_url": "hush",}', "not valid JSON"),
    "a file that is no JSON": ("broken.json", "broken.json:1:"),
    "a file that is not there": ("gone.json", "no such file"),
    "a variable that is not set": ("unset.json", "the environment variable GONE"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named_without_its_secret(mistake):
    written, expected = WRONG[mistake]
    Path("broken.json").write_text('{"callback_url": "http://host/hush",}')
    Path("unset.json").write_text(json.dumps(RAW | {"auth_token": "{env:GONE}"}))
    value = [written] if isinstance(written, dict) else written
    problems = refused(webhook_config=value)
    only(problems, '"webhook_config', expected)
    assert "hush" not in problems[0]


def test_secrets_are_in_no_text_of_the_config():
    config = load(webhook_config=[DISCORD, RAW])
    for text in (repr(config), str(config.model_dump()), config.model_dump_json()):
        assert "hush" not in text
    assert "hush" not in repr(Webhook.model_validate(RAW))
