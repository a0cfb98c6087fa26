"""Uploads to the Hub, to a local server that speaks its API: they go well, fail, and never stop a
run.
"""

import json
import threading

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train.hub import HubUploads, check_access


@pytest.fixture
def hub(monkeypatch):
    """The server, with the client and its token set to it."""
    served = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield served
    served.close()
    huggingface_hub.close_session()


@pytest.fixture
def said():
    return []


@pytest.fixture
def uploads(hub, said):
    """Makes the uploader of a run, without the waits between tries."""
    made = []

    def make(background=False):
        made.append(
            HubUploads("cat", private=True, background=background, say=said.append, waits=(0, 0, 0))
        )
        return made[-1]

    yield make
    hub.open.set()
    for each in made:
        each.close()
        # what was interrupted goes on in its thread, and would upload to the next test's server
        if each._thread is not None:
            each._thread.join(60)
            assert not each._thread.is_alive()


@pytest.fixture
def folder(tmp_path):
    """Makes a folder to upload."""

    def make(name):
        path = tmp_path / name
        (path / "images").mkdir(parents=True)
        (path / "README.md").write_text(f"---\nlicense: other\n---\n{name}")
        (path / "a.safetensors").write_bytes(name.encode() * 1000)
        return path

    return make


def test_a_folder_is_uploaded_whole_to_a_new_private_repository(hub, uploads, folder, said):
    uploading, first = uploads(), folder("one")
    uploading.upload(first, "first")
    assert hub.made == {"jane/cat": "private"}
    assert uploading.repository == "jane/cat"
    assert hub.files["a.safetensors"] == b"one" * 1000
    assert hub.files["README.md"].endswith(b"one")
    assert not first.exists()
    uploading.upload(folder("two"), "second")
    assert hub.commits == ["first", "second"]
    assert hub.requests.count("/api/repos/create") == 1
    assert said == ["first: uploaded to jane/cat", "second: uploaded to jane/cat"]


@pytest.mark.parametrize("part", ["/api/repos/create", "/commit/", "/info/lfs/objects/batch"])
@pytest.mark.parametrize("failure", [500, "hang up"])
def test_two_failures_are_tried_again(hub, uploads, folder, said, part, failure):
    hub.failing[part] = [failure, failure]
    uploads().upload(folder("one"), "first")
    assert hub.commits == ["first"]
    assert said == ["first: uploaded to jane/cat"]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, uploads, folder, said):
    hub.losing["/commit/"] = 1
    uploads().upload(folder("one"), "first")
    assert hub.commits == ["first"]
    assert hub.losing["/commit/"] == 0
    assert said == ["first: uploaded to jane/cat"]


@pytest.mark.parametrize("failure", [500, "hang up"])
def test_the_third_failure_is_told_and_the_next_upload_is_tried(
    hub, uploads, folder, said, failure
):
    uploading, lost = uploads(), folder("one")
    hub.failing["/api/repos/create"] = [failure] * 3
    uploading.upload(lost, "first")
    assert len(said) == 1
    assert "first: not uploaded to cat after 3 tries" in said[0]
    assert "the run goes on" in said[0]
    assert not lost.exists()
    uploading.upload(folder("two"), "second")
    assert hub.commits == ["second"]


def test_a_refusal_is_not_tried_again(hub, uploads, folder, said, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    uploads().upload(folder("one"), "first")
    assert hub.requests.count("/api/repos/create") == 1
    assert "after 1 try" in said[0]
    assert "xxx" not in said[0]


def test_a_dead_server_is_told(hub, uploads, folder, said):
    hub.close()
    uploads().upload(folder("one"), "first")
    assert "after 3 tries" in said[0]


def test_in_the_background_the_newest_that_waits_goes(hub, uploads, folder, said):
    hub.open.clear()
    uploading = uploads(background=True)
    uploading.upload(folder("one"), "first")
    assert hub.waiting.wait(60)
    skipped = folder("two")
    uploading.upload(skipped, "second")
    uploading.upload(folder("three"), "third")
    assert hub.commits == []
    assert said == ["second: not uploaded, third is newer"]
    assert not skipped.exists()
    hub.open.set()
    uploading.close()
    assert hub.commits == ["first", "third"]
    assert hub.files["a.safetensors"] == b"three" * 1000


def test_closing_waits_and_says_for_what(hub, uploads, folder, said, monkeypatch):
    monkeypatch.setattr("fluxfast.train.hub._TOLD_EVERY", 0.01)
    hub.open.clear()
    uploading = uploads(background=True)
    uploading.upload(folder("one"), "first")
    assert hub.waiting.wait(60)
    closing = threading.Thread(target=uploading.close)
    closing.start()
    while len(said) < 2:
        closing.join(0.01)
    assert closing.is_alive()
    assert said[:2] == [
        "first: waiting for the upload to jane/cat (an interrupt leaves it undone)",
        "first: still uploading to jane/cat",
    ]
    hub.open.set()
    closing.join(60)
    assert hub.commits == ["first"]


def test_an_interrupt_leaves_the_upload(hub, uploads, folder, said, monkeypatch):
    def interrupted(text):
        said.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr("fluxfast.train.hub._TOLD_EVERY", 0.01)
    hub.open.clear()
    uploading = uploads()
    monkeypatch.setattr(uploading, "_say", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uploading.upload(folder("one"), "first")
    monkeypatch.setattr(uploading, "_say", said.append)
    # it returns at once, though the server has not answered
    uploading.close()
    assert said == ["first: still uploading to cat"]
    assert hub.commits == []


# ---- before anything is loaded


def access(write_config, notes=None, **changes):
    config = load_config(write_config(push_to_hub=True, **changes))
    return check_access(config, [] if notes is None else notes)


def problem(write_config, **changes):
    with pytest.raises(ConfigError) as caught:
        access(write_config, **changes)
    return str(caught.value)


def test_the_repository_is_named_after_the_project(hub, write_config):
    assert access(write_config, tracker_project_name="My cat!") == "jane/My-cat"
    assert access(write_config, hub_model_id="club/cat") == "club/cat"


def test_no_token_is_an_error_that_says_how_to_sign_in(hub, write_config, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    told = problem(write_config)
    assert "no token" in told
    assert "hf auth login" in told
    assert "HF_TOKEN" in told


def test_a_wrong_token_is_an_error(hub, write_config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    assert "refuses the token" in (told := problem(write_config))
    assert "xxx" not in told


def test_a_token_that_may_not_write_is_an_error(hub, write_config):
    assert "jane is not else" in problem(write_config, hub_model_id="else/cat")
    token = hub.account["auth"]["accessToken"]
    token["role"] = "read"
    assert "may only read" in problem(write_config)
    token |= {"role": "fineGrained", "fineGrained": {"scoped": []}}
    assert "may not write to repositories of jane" in problem(write_config)
    scope = {"entity": {"type": "user", "name": "jane"}, "permissions": ["repo.write"]}
    token["fineGrained"]["scoped"] = [scope]
    assert access(write_config, hub_model_id="cat") == "jane/cat"


def test_a_hub_that_does_not_answer_is_a_note(hub, write_config):
    hub.failing["whoami"] = [503]
    notes = []
    assert access(write_config, notes, hub_model_id="cat") == "cat"
    assert "does not answer" in notes[0]
    hub.close()
    assert access(write_config, notes, hub_model_id="cat") == "cat"
    assert len(notes) == 2


def test_a_public_repository_is_told(hub, write_config):
    hub.made["jane/cat"] = "public"
    notes = []
    access(write_config, notes, hub_model_id="cat")
    assert "public already" in notes[0]
    hub.made["jane/cat"] = "private"
    access(write_config, notes, hub_model_id="cat")
    assert len(notes) == 1


# ---- a run


def test_a_run_uploads_its_checkpoints_and_its_end(hub, run):
    lora, out = run(
        push_to_hub=True, push_checkpoints_to_hub=True, hub_model_id="cat",
        validation_disable=False, validation_prompt="a cat", validation_resolution="64",
        validation_num_inference_steps=1, validation_step_interval=0, max_train_steps=4,
    )  # fmt: skip
    assert hub.commits == ["checkpoint of step 2", "adapter after 4 steps"]
    assert hub.files["pytorch_lora_weights.safetensors"] == lora.read_bytes()
    assert set(hub.files) == {
        "pytorch_lora_weights.safetensors", "README.md", "fluxfast_config.json",
        "images/000_64x64.png",
    }  # fmt: skip
    config = json.loads(hub.files["fluxfast_config.json"])
    assert (config["lora_rank"], config["validation_prompt"]) == (3, "a cat")
    card = hub.files["README.md"].decode()
    assert "license_name: flux-1-dev-non-commercial-license" in card
    assert str(lora.parent.parent) not in card + json.dumps(config)
    assert "adapter after 4 steps: uploaded to jane/cat" in out.getvalue()
    assert not list(lora.parent.glob(".*"))


@pytest.mark.parametrize("background", [True, False])
def test_a_server_that_dies_midway_does_not_stop_the_run(hub, run, monkeypatch, background):
    def impatient(*args, **options):
        return HubUploads(*args, **options, waits=(0, 0, 0))

    def kill():
        assert hub.waiting.wait(60)
        hub.close()

    monkeypatch.setattr("fluxfast.train.publish.HubUploads", impatient)
    hub.open.clear()
    killing = threading.Thread(target=kill)
    killing.start()
    lora, out = run(
        push_to_hub=True, push_checkpoints_to_hub=True, push_to_hub_background=background,
        max_train_steps=4,
    )  # fmt: skip
    killing.join()
    assert lora.exists()
    assert len((lora.parent / "metrics.jsonl").read_text().splitlines()) == 4
    assert "checkpoint of step 2: not uploaded to jane/" in out.getvalue()
    assert "adapter after 4 steps: not uploaded to jane/" in out.getvalue()
    assert hub.commits == []
    assert not list(lora.parent.glob(".*"))
