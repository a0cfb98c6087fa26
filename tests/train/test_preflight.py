"""What is wrong with a run is found before its first image is encoded, and told all at once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxfast.config.datasets import load_data_config
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.data.cache import TensorCache
from fluxfast.data.cache_index import owner_of_images
from fluxfast.files import TEMPORARY
from fluxfast.train import build_data, disk_space, preflight, trainer

CPU = torch.device("cpu")


@pytest.fixture
def check(write_config):
    return lambda **changes: preflight.check(load_config(write_config(**changes)), CPU)


@pytest.fixture
def problems(check):
    def found(**changes):
        with pytest.raises(ConfigError) as caught:
            check(**changes)
        return caught.value.problems

    return found


def only(found, *parts):
    assert len(found) == 1, found
    assert all(part in found[0] for part in parts), found[0]


def test_a_sound_run_has_nothing_to_tell(check, tmp_path):
    assert check() == (None, None, (), "")
    assert not (tmp_path / "output").exists()


def test_a_gpu_that_no_run_trains_on_is_refused(problems, pretend_gpu):
    pretend_gpu("T4")
    only(problems(), "T4 has no tensor cores for bf16", "RTX 30 series")


def test_every_problem_comes_at_once_and_nothing_is_read_before(
    run, monkeypatch, tmp_path, workspace
):
    def refuse(*args, **kwargs):
        raise AssertionError("the data was prepared")

    monkeypatch.setattr(trainer, "load_data", refuse)
    monkeypatch.setattr(build_data, "prepare", refuse)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        run(
            dataset={"instance_data_dir": str(tmp_path / "no-images")},
            init_lora=str(tmp_path / "typing-error.safetensors"),
            output_dir=str(tmp_path / "file" / "inside"),
            pretrained_vae_model_name_or_path=str(workspace / "images"),
            pretrained_t5_model_name_or_path=str(tmp_path / "no-t5"),
            validation_disable=False,
            user_prompt_library=str(tmp_path / "no-prompts.json"),
            resume_from_checkpoint="checkpoint-7",
            tread_config={
                "routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 9}]
            },
            quantize_via="accelerator",
            base_model_precision="int8-quanto",
        )
    found = caught.value.problems
    parts = (
        "no-images: no such folder",
        "typing-error.safetensors",
        '"output_dir"',
        "holds no folder 'vae'",
        "no-t5: no such folder",
        "no-prompts.json: no such file",
        '"checkpoint-7": no such folder',
        "there is no block 9",
        'quantize_via is "accelerator"',
    )
    for part in parts:
        assert sum(part in problem for problem in found) == 1, (part, found)
    assert len(found) == len(parts), found


def test_a_hub_name_waits_until_nothing_else_is_wrong(problems, check, monkeypatch, tmp_path):
    asked = []

    def local_folder(source):
        asked.append(source[0])
        raise ValueError(f"{source[0]}: not downloaded here")

    monkeypatch.setattr(preflight, "local_folder", local_folder)
    hub = {
        "pretrained_vae_model_name_or_path": "owner/vae",
        "init_lora": str(tmp_path / "none.safetensors"),
    }
    problems(**hub)
    assert "owner/vae" not in asked
    # and with nothing else wrong it is looked up
    monkeypatch.setattr(preflight, "_sources", lambda config: [config.vae_source])
    only(problems(**hub | {"init_lora": None}), "owner/vae: not downloaded here")


def test_the_base_is_opened_and_compared(problems, tmp_path, workspace):
    base = tmp_path / "transformer"
    shutil.copytree(workspace / "pipeline" / "transformer", base)
    weights = next(base.glob("*.safetensors"))
    tensors = load_file(weights)
    key = "transformer_blocks.0.attn.to_q.weight"
    named = {
        "pretrained_transformer_model_name_or_path": str(base),
        "pretrained_transformer_subfolder": "none",
    }
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    only(problems(**named), "1 missing", key)
    save_file(tensors | {key: tensors[key][:5].contiguous()}, weights)
    only(problems(**named), key, "expected")
    weights.write_bytes(weights.read_bytes()[:500])
    only(problems(**named), weights.name)
    only(
        problems(pretrained_transformer_model_name_or_path=str(tmp_path / "no.safetensors")),
        "no.safetensors",
    )
    assert all(
        str(tmp_path) in problem
        for problem in problems(pretrained_model_name_or_path=str(tmp_path))
    )


def test_a_model_folder_without_weights(problems, tmp_path, workspace):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(workspace / "pipeline", pipeline)
    for weights in (pipeline / "vae").glob("*.safetensors"):
        weights.unlink()
    only(problems(pretrained_model_name_or_path=str(pipeline)), "vae: holds no .safetensors file")
    shutil.rmtree(pipeline / "scheduler")
    assert len(problems(pretrained_model_name_or_path=str(pipeline))) == 2


def test_adapter_and_base_are_compared(problems, check, run, tmp_path):
    only(problems(peft_lora_target_modules=["to_q", "to_z"]), "to_z")
    # an embedder takes in 64 features
    found = problems(flux_lora_target="all+ffs+embedder", lora_init_type="pissa", lora_rank=200)
    only(found, "can't take rank 200")
    lora, _ = run(max_train_steps=1, mixed_precision="no", optimizer="torch-adamw")
    tensors = load_file(lora)
    wrong = tmp_path / "wrong.safetensors"
    save_file(
        {key.replace("blocks.0", "blocks.5"): tensor for key, tensor in tensors.items()}, wrong
    )
    only(problems(name="other", init_lora=str(wrong)), "wrong.safetensors", "no such linear layers")
    save_file(
        {key: t[:, :7].contiguous() if "lora_A" in key else t for key, t in tensors.items()}, wrong
    )
    only(problems(name="other", init_lora=str(wrong)), "wrong.safetensors", "expected [3,")
    (tmp_path / "words.safetensors").write_text("a letter")
    only(problems(name="other", init_lora=str(tmp_path / "words.safetensors")), "words.safetensors")
    checked = check(name="other", init_lora=str(lora))
    assert checked.lora.rank == 3 and len(checked.notes) == 1


def test_a_format_that_can_not_hold_the_adapter_is_refused_before_it_trains(problems, check):
    assert check(lora_format="kohya").lora is None
    only(
        problems(lora_format="kohya", use_dora=True, lora_dropout=0.0),
        "DoRA has no lora_format 'kohya': choose diffusers or comfyui or lycoris",
    )


def test_a_damaged_checkpoint_is_refused_and_never_trained_from(run, problems, tmp_path):
    mode = {"mixed_precision": "no", "optimizer": "torch-adamw"}
    run(max_train_steps=4, **mode)
    file = tmp_path / "output" / "checkpoint-4" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-200:-192] = bytes(8 * [7])
    file.write_bytes(data)
    only(
        problems(**mode),
        "checkpoint-4: damaged",
        "optimizer.safetensors has changed",
        "checkpoint-2",
    )
    _, out = run(resume_from_checkpoint="checkpoint-2", max_train_steps=3, **mode)
    assert "resumed from" in out.getvalue() and "checkpoint-4: of a longer run" in out.getvalue()
    assert not [p for p in (tmp_path / "output").rglob("*") if p.name.endswith(TEMPORARY)]


def test_a_disk_that_is_too_small(problems, check, monkeypatch):
    def free(size):
        monkeypatch.setattr(disk_space, "free_bytes", lambda path: size)

    free(1000)
    only(problems(), "a checkpoint takes", "0.00 GB left", '"output_dir"')
    free(1 << 40)
    assert check().notes == ()


def test_what_may_not_fit_is_a_note(write_config, monkeypatch, tmp_path):
    config = load_config(write_config(checkpoints_total_limit=2))
    (dataset,) = load_data_config(
        config.data_backend_config, defaults=config.dataset_defaults
    ).images
    dataset = dataset.model_copy(update={"cache_dir_vae": tmp_path / "new"})
    gb = 10**9
    # two checkpoints and the next one, before the oldest goes
    for left, fits in ((4 * gb, True), (2 * gb, False)):
        monkeypatch.setattr(disk_space, "free_bytes", lambda path, left=left: left)
        found, notes = disk_space.shortage(config, [dataset], tmp_path / "text", gb)
        assert found == [] and bool(notes) is not fits
    assert (
        "has 2.00 GB left, and this run may take 3.0" in notes[0]
        and "checkpoints 3.00 GB, latents 0.00 GB" in notes[0]
    )
    # the index that a look at the data leaves in the cache is not what will be there
    cache = TensorCache(tmp_path / "new")
    assert disk_space.shortage(config, [dataset], tmp_path / "text", gb) == (found, notes)
    # nor is what another dataset has there
    cache.note_use([("a", "b")], "another")
    assert disk_space.shortage(config, [dataset], tmp_path / "text", gb) == (found, notes)
    cache.note_use([("a", "b")], owner_of_images(dataset.id, dataset.instance_data_dir))
    _, (without,) = disk_space.shortage(config, [dataset], tmp_path / "text", gb)
    assert "latents" not in without
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: gb)
    (found,), _ = disk_space.shortage(config, [dataset], tmp_path / "text", gb)
    assert "a checkpoint takes 1.25 GB, and its disk has 1.00 GB left" in found


def test_a_checkpoint_is_as_large_as_was_reckoned(run, check, monkeypatch, tmp_path):
    sizes = []
    reckon = disk_space.checkpoint_bytes
    monkeypatch.setattr(
        disk_space, "checkpoint_bytes", lambda *args: sizes.append(reckon(*args)) or sizes[-1]
    )
    for optimizer, precision in (("torch-adamw", "no"), ("adamw_bf16", "bf16")):
        run(name=optimizer, max_train_steps=1, optimizer=optimizer, mixed_precision=precision)
        written = (tmp_path / optimizer / "checkpoint-1").glob("*.safetensors")
        # names and the header come on top
        assert sizes[-1] < sum(path.stat().st_size for path in written) < sizes[-1] + 60_000


def test_a_place_where_nothing_can_be_written(problems, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.os, "access", lambda path, mode: False)
    found = problems()
    assert (
        sum('"output_dir"' in problem and "nothing can be written" in problem for problem in found)
        == 1
    )


def test_a_damaged_data_config_is_one_problem_of_several(problems, write_config, tmp_path):
    path = write_config(init_lora=str(tmp_path / "none.safetensors"))
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a", "resolutoin": 1}]))
    with pytest.raises(ConfigError) as caught:
        preflight.check(load_config(path), CPU)
    assert sum("data.json" in problem for problem in caught.value.problems) >= 1
    assert sum("none.safetensors" in problem for problem in caught.value.problems) == 1


def test_prompts_that_no_encoder_can_read(problems, tmp_path):
    library = tmp_path / "prompts.json"
    library.write_text('{"half": "a \\ud83d cup"}')
    only(
        problems(validation_disable=False, user_prompt_library=str(library)),
        '"half"',
        "half of a character",
    )
