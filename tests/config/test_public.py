"""What of a run's config leaves the machine: no secret, and no path of it."""

import json

import pytest

from config_helpers import load, only, refused
from fluxfast.config.hub_fields import repository_name
from fluxfast.config.public import REMOVED, public_settings, redact, shown_settings
from fluxfast.config.run import TrainConfig
from secret_cases import HIDDEN, PATHS, SECRETS, full_of


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("unfit", [*SECRETS.values(), *PATHS.values()], ids=[*SECRETS, *PATHS])
def test_a_public_config_holds_no_secret_and_no_path(tmp_path, unfit):
    texts = full_of(unfit)
    assert {"validation_prompt", "instance_prompt", "tracker_run_name", "model_card_note"} <= {
        *texts
    }
    config = load(**texts, push_to_hub=True, output_dir=f"{tmp_path}/jane/secret")
    written = json.dumps(public_settings(config), ensure_ascii=False)
    assert not [part for part in HIDDEN if part in written], written
    assert str(tmp_path) not in written


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_run_s_own_record_keeps_paths_and_no_secret(secret):
    shown = shown_settings(load(**full_of(secret), output_dir="/srv/runs/cat"))
    assert not [part for part in HIDDEN if part in json.dumps(shown)]
    assert shown["output_dir"] == "/srv/runs/cat"
    assert set(shown) == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    "text",
    [
        "a cat and/or a dog, 24mm f/1.8, w/ a hat, 1/2 / 3/4",
        "hatsune miku \\(vocaloid\\), score_9, <b>bold</b>",
        "see https://huggingface.co/black-forest-labs/FLUX.1-dev and https://example.org/a-b.",
        "black-forest-labs/FLUX.1-dev",
        "time 12:30, ratio 3:2; A: yes",
        "a ring bearer: 5 years",
        "two\nlines",
        "",
    ],
)
def test_texts_without_either_stay_as_they_are(text):
    assert redact(text) == text


def test_only_what_is_unfit_is_taken_out():
    assert redact("a cat in /home/jane/x.png, sleeping") == f"a cat in {REMOVED} sleeping"
    assert redact(f"key {SECRETS['token']}!") == f"key {REMOVED}!"
    assert redact("a cat in /home/jane/x.png", paths=False) == "a cat in /home/jane/x.png"
    # nobody can tell where a path with spaces ends
    assert redact("/home/Jane Doe") == REMOVED


def test_what_the_config_gives_is_public_and_loads_again(tmp_path):
    given = {
        "learning_rate": 1e-4, "lora_rank": 8, "validation_prompt": "a cat", "seed": 3,
        "pretrained_model_name_or_path": "owner/name", "flux_lora_target": "all+ffs",
        "optimizer_config": {"weight_decay": 0.1}, "flow_custom_timesteps": [1, 500],
    }  # fmt: skip
    public = public_settings(load(**given, output_dir="out"))
    assert public == {
        "model_type": "lora", "model_family": "flux", **given, "flow_custom_timesteps": [1.0, 500.0]
    }  # fmt: skip
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert "pretrained_model_name_or_path" not in public_settings(load(**given))
    assert public_settings(load(**public)) == {
        name: value for name, value in public.items() if not name.startswith("pretrained")
    }


def test_names_of_repositories():
    assert load(push_to_hub=True, hub_model_id="me/my-cat.v2").hub_model_id == "me/my-cat.v2"
    for name in ("a/b/c", "me/", "me/cat.git", "a--b", "https://huggingface.co/me/cat", "x" * 97):
        only(refused(push_to_hub=True, hub_model_id=name), '"hub_model_id"', "owner/name")
    assert repository_name("My  cat: v1.0 / final!") == "My-cat-v1.0-final"
    assert repository_name("katze.git") == "katze"
    assert repository_name("猫") == "lora"
    assert len(repository_name("x" * 200)) == 96


def test_webhooks_are_neither_public_nor_shown():
    hooks = [
        {"webhook_type": "discord", "webhook_url": SECRETS["webhook"]},
        {"webhook_type": "raw", "callback_url": SECRETS["login"], "auth_token": "secretpart"},
    ]
    config = load(webhook_config=hooks)
    assert "webhook_config" not in public_settings(config)
    shown = shown_settings(config)
    assert shown["webhook_config"] == REMOVED
    assert not [part for part in HIDDEN if part in json.dumps(shown)]
