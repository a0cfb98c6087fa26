"""What becomes of calls that an accelerated block leaves to its host: counted, named once, an error
where asked for.
"""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from dropin_hosts import (
    FP32,
    Flux,
    OlderFlux,
    add_lora,
    assert_equal,
    diffusers_host,
    inject_peft,
    pair,
)
from torch import nn

import fluxfast
from fluxfast.dropin.arguments import arguments, signature_of
from fluxfast.dropin.calls import CallLog, Notices
from support import make_inputs, relative_error

HOSTS = {"diffusers": diffusers_host, "concatenated": OlderFlux, "bfl": Flux}
every_layout = pytest.mark.parametrize("layout", HOSTS)
other_layouts = pytest.mark.parametrize("layout", ["concatenated", "bfl"])


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


def hosts(layout):
    torch.manual_seed(0)
    return pair(lambda: HOSTS[layout]().requires_grad_(False))


def output(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out[0]


def counts(report):
    return tuple(report.calls(how) for how in ("fused", "composed", "host"))


def single_blocks(model):
    return model.single_blocks if isinstance(model, Flux) else model.single_transformer_blocks


# ---- which arguments say anything -------------------------------------------------------------------------------------------


def block(
    self, x, vec, mask=None, flag=False, scale=1.0, sizes=(1, 2), extra=None, *, mode="a"
): ...


def open_block(self, x, vec, mask=None, **more): ...


SAME_AS_DEFAULT = [
    {"mask": None},
    {"flag": False},
    {"scale": 1},
    {"sizes": (1, 2)},
    {"extra": {}},
    {"extra": []},
    {"mode": "a"},
    {"mask": None, "flag": False, "scale": 1.0, "sizes": (1, 2), "extra": None, "mode": "a"},
]


@pytest.mark.parametrize("given", SAME_AS_DEFAULT)
def test_an_argument_at_its_default_says_nothing(given):
    signature = signature_of(block)
    by_name = arguments(signature, ("x",), {"vec": "v", **given}, frozenset({"x", "vec"}))
    assert by_name == ({"x": "x", "vec": "v"}, None, "")
    order = ["mask", "flag", "scale", "sizes", "extra"]
    positional = [given.get(name, signature.defaults[name]) for name in order]
    named = {name: value for name, value in given.items() if name not in order}
    assert arguments(signature, ("x", "v", *positional), named, frozenset({"x", "vec"})) == by_name


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"flag": True}, "flag=True"),
        ({"scale": 0.5}, "scale=0.5"),
        ({"sizes": (1, 3)}, "sizes=(1, 3)"),
        ({"sizes": None}, "sizes=None"),
        ({"extra": {"a": None}}, "extra={'a': None}"),
        ({"mask": torch.ones(2, 7)}, "mask=a tensor [2, 7] of torch.float32"),
        ({"mode": "b"}, "mode='b'"),
    ],
)
def test_any_other_value_is_the_hosts_affair(given, shown):
    known, because, value = arguments(
        signature_of(block), ("x", "v"), given, frozenset({"x", "vec"})
    )
    assert (
        not known
        and because == f"only the host knows its argument {shown.partition('=')[0]}"
        and value == shown
    )


def test_arguments_that_no_signature_has():
    x, v, known = "x", "v", frozenset({"x", "vec"})
    assert arguments(signature_of(block), (x, v), {"other": None}, known).because
    assert arguments(signature_of(block), (x, v), {"x": x}, known).because
    assert arguments(signature_of(block), (x, v, *range(9)), {}, known).because
    # a host that takes anything by name finds None where nothing is given
    assert arguments(signature_of(open_block), (x, v), {"other": None}, known).because is None
    assert arguments(signature_of(open_block), (x, v), {"other": False}, known).because


# ---- what a host calls its blocks with --------------------------------------------------------------------------------------


@other_layouts
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_host_that_passes_its_defaults_is_fused(inputs, layout, checkpointed):
    host, ours = hosts(layout)
    for model in (host, ours):
        inject_peft(model)
        model.train()
        model.checkpointing = checkpointed
        for part in single_blocks(model):
            part.gradient_checkpointing = checkpointed
    report = fluxfast.accelerate(ours, strict=True)
    assert "5 of 5 blocks can run fused; no call so far" in str(report)
    assert_equal(host, ours, inputs)
    assert counts(report) == (5, 0, 0) and "5 of 5 blocks can run fused; 5 of 5 calls did" in str(
        report
    )


OPTIONS = {
    "concatenated": ({"offload": True}, {"stages": (1, 2)}, {"stages": None, "offload": False}),
    "bfl": ({"split": True}, {"lengths": [3]}, {"lengths": None, "split": 1.0 + 1e-9}),
}


@other_layouts
@pytest.mark.parametrize("number", range(3))
def test_an_argument_that_only_the_host_knows(inputs, layout, number):
    host, ours = hosts(layout)
    report = fluxfast.accelerate(ours)
    ours.options = {**ours.options, **OPTIONS[layout][number]}
    name, value = next(
        (name, v)
        for name, v in ours.options.items()
        if v != host.options[name] and (v or name == "stages")
    )
    with pytest.warns(UserWarning, match="by the host's own forward") as caught:
        assert torch.equal(output(ours, inputs), output(host, inputs))
    (message,) = {str(w.message) for w in caught if "fluxfast" in str(w.message)}
    first = report.blocks[0].name
    assert first in message and f"{name}={value!r}" in message and "strict=True" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(ours, inputs)
    assert counts(report) == (0, 0, 10)
    assert [one.calls.count("host") for one in report.blocks] == [2] * 5
    text = str(report)
    assert "5 of 5 blocks can run fused; 0 of 10 calls did" in text and f"{name}={value!r}" in text
    assert (
        "10 calls in 5 blocks ran by the host's own forward: only the host knows its argument "
        f"{name}" in text
    )
    assert str(fluxfast.dropin.inspect(ours)) == text
    (fallback,) = report.to_dict()["blocks"][0]["calls"]["fallbacks"]
    assert fallback == {
        **{"how": "host", "because": f"only the host knows its argument {name}"},
        **{"calls": 2, "last": f"{name}={value!r}"},
    }
    report = fluxfast.accelerate(ours, strict=True)
    with pytest.raises(
        ValueError,
        match=rf"strict=True.*{first} would run by the host's own forward.*argument {name}",
    ):
        output(ours, inputs)
    assert counts(report) == (0, 0, 0)


@other_layouts
def test_fallbacks_are_counted_by_reason(inputs, layout):
    _, ours = hosts(layout)
    report = fluxfast.accelerate(ours)
    output(ours, inputs)
    single_blocks(ours)[1].register_forward_hook(lambda *_: None)
    act = single_blocks(ours)[0]
    act = act.mlp_act if layout == "bfl" else act.act_mlp
    handle = act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="GELU is called as a module: it has hooks"):
        output(ours, inputs)
    handle.remove()
    output(ours, inputs)
    # a hook on a block itself sees the block, whatever runs in it
    assert counts(report) == (14, 0, 1)
    assert "14 of 15 calls did" in str(
        report
    ) and "1 call in 1 block ran by the host's own forward" in str(report)


# ---- every way off the fused path -------------------------------------------------------------------------------------------


def other_processor(model):
    processor = model.transformer_blocks[0].attn.processor
    model.transformer_blocks[0].attn.set_processor(type("Other", (type(processor),), {})())


def hook_on_attention(model):
    model.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_: None)


def hook_on_norm(model):
    model.transformer_blocks[0].norm2.register_forward_hook(lambda *_: None)


def hook_on_linear(model):
    model.transformer_blocks[0].ff.net[2].register_forward_hook(lambda *_: None)


def hook_on_dropout(model):
    model.transformer_blocks[0].attn.to_out[1].register_forward_hook(lambda *_: None)


def exact_gelu(model):
    model.single_transformer_blocks[0].act_mlp = nn.GELU()


def other_norm(model):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * 1.5

    dim = model.transformer_blocks[0].norm2.normalized_shape
    model.transformer_blocks[0].norm2 = Norm(dim, elementwise_affine=False, eps=1e-6)


def norm_with_weights(model):
    model.transformer_blocks[0].norm2 = nn.LayerNorm(
        model.transformer_blocks[0].norm2.normalized_shape, eps=1e-6
    )
    with torch.no_grad():
        model.transformer_blocks[0].norm2.weight.fill_(1.5)
    model.requires_grad_(False)


def dora(model):
    add_lora(model, use_dora=True, targets=["to_q"])


def dora_on_modulation(model):
    add_lora(model, use_dora=True, targets=["norm1.linear"])


def trained_base(model):
    model.transformer_blocks[0].ff.net[2].requires_grad_(True)


def trained_norm(model):
    model.transformer_blocks[0].attn.norm_q.requires_grad_(True)


WAYS_OFF = {
    other_processor: ("composed", "its attention processor is Other"),
    hook_on_attention: ("composed", "its FluxAttention is called as a module: it has hooks"),
    hook_on_norm: ("host", "its LayerNorm is called as a module: it has hooks"),
    hook_on_linear: ("composed", "a linear of it is called by its module: it has hooks"),
    hook_on_dropout: ("composed", "its Dropout is called as a module: it has hooks"),
    exact_gelu: ("host", "its GELU is not the module that FLUX.1 has there"),
    other_norm: ("host", "its Norm is not the module that FLUX.1 has there"),
    norm_with_weights: ("host", "its LayerNorm is not the module that FLUX.1 has there"),
    dora: ("composed", "is no plain LoRA but DoraLinearVariant"),
    dora_on_modulation: ("module", "is no plain LoRA but DoraLinearVariant"),
    trained_base: ("composed", "its base is trained"),
    trained_norm: ("composed", "an RMS norm of its q or k is trained"),
}


@pytest.mark.parametrize("change", WAYS_OFF)
def test_every_way_off_the_fused_path_is_seen(inputs, change):
    how, because = WAYS_OFF[change]
    host, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    for model in (host, ours):
        torch.manual_seed(0)
        change(model)
    with pytest.warns(UserWarning, match="fluxfast: ") as caught:
        assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    messages = [str(w.message) for w in caught if str(w.message).startswith("fluxfast")]
    assert len(messages) == 1 and because in messages[0]
    seen = {key: calls for one in report.blocks for key, calls in one.calls.fallbacks().items()}
    ((way, reason),) = seen
    assert way == how and because in reason and reason in str(report)
    # a modulation is no block's own: its block is fused beside it
    assert report.calls("fused") == 5 - (
        0 if how == "module" else len([b for b in report.blocks if b.calls.count(how)])
    )
    # what is there already is an error at once, and the model is as it was
    with pytest.raises(ValueError, match=r"strict=True.*would not run fused"):
        fluxfast.accelerate(ours, strict=True)
    with pytest.raises(ValueError, match="call fluxfast"):
        fluxfast.dropin.inspect(ours)
    assert torch.equal(output(ours, inputs), output(host, inputs))
    # what comes later is one in the call
    _, later = hosts("diffusers")
    fluxfast.accelerate(later, strict=True)
    change(later)
    with pytest.raises(ValueError, match=r"strict=True.*blocks\.0 would run"):
        output(later, inputs)


def test_a_block_without_positions_is_the_hosts(inputs):
    host, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    x, txt, vec = torch.randn(1, 12, 64), torch.randn(1, 7, 64), torch.randn(1, 64)

    def blocks(model):
        with torch.no_grad():
            return [
                *model.transformer_blocks[0](x, txt, vec),
                *model.single_transformer_blocks[0](x, txt, vec),
            ]

    with pytest.warns(UserWarning, match="without image_rotary_emb"):
        actual = blocks(ours)
    assert all(map(torch.equal, actual, blocks(host))) and counts(report) == (0, 0, 2)


def test_a_vector_for_each_token_is_the_hosts():
    """What only the host's own modulation can take: the host runs, and says what it has to say."""
    _, ours = hosts("bfl")
    report = fluxfast.accelerate(ours)
    pe = torch.eye(2).expand(1, 1, 12, 16, 2, 2)
    with pytest.warns(UserWarning, match="its vec is of each token"), pytest.raises(RuntimeError):
        ours.single_blocks[0](torch.randn(1, 12, 64), torch.randn(1, 5, 64), pe)
    assert counts(report) == (0, 0, 1)


def test_joint_attention_kwargs(inputs):
    _, ours = hosts("diffusers")
    report = fluxfast.accelerate(ours)
    for nothing in (None, {}, {"attention_mask": None}, {"other": None}):
        output(ours, {**inputs, "joint_attention_kwargs": nothing})
    assert counts(report) == (20, 0, 0)
    with pytest.warns(UserWarning, match=r"joint_attention_kwargs \['other'\]"):
        output(ours, {**inputs, "joint_attention_kwargs": {"other": 1}})
    assert counts(report) == (20, 5, 0)


@every_layout
def test_a_matrix_unit_is_a_reason_too(inputs, layout, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: True)
    _, ours = hosts(layout)
    report = fluxfast.accelerate(ours, strict=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="matrix unit"):
        output(ours, inputs)
    report = fluxfast.accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="matrix unit"):
        output(ours, inputs)
    assert counts(report) == (0, 0, 5)
    ours.to(torch.bfloat16)
    with pytest.raises(ValueError, match="matrix unit"):
        fluxfast.accelerate(ours, strict=True)


# ---- whose counts they are --------------------------------------------------------------------------------------------------


def test_each_model_has_counts_and_warnings_of_its_own(inputs):
    _, ours = hosts("concatenated")
    first = fluxfast.accelerate(ours)
    ours.options["offload"] = True
    copies = [ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    reports = [fluxfast.dropin.inspect(model) for model in copies]
    for model in copies:
        with pytest.warns(UserWarning, match="offload=True"):
            output(model, inputs)
    assert [counts(report) for report in (first, *reports)] == [(0, 0, 5)] * 4
    # anew: from none, and said again
    second = fluxfast.accelerate(ours)
    with pytest.warns(UserWarning, match="offload=True"):
        output(ours, inputs)
    assert counts(first) == counts(second) == (0, 0, 5)
    fluxfast.restore(ours)
    output(ours, inputs)
    assert counts(second) == (0, 0, 5)


def test_threads_lose_no_call():
    log = CallLog("a block", Notices(strict=False))

    def call():
        for i in range(500):
            log.record("fused")
            log.record("host", "a reason", f"number {i}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (log.count("fused"), log.count("host"), log.total) == (2000, 2000, 4000)
    assert log.fallbacks()["host", "a reason"].calls == 2000 and len(caught) == 1


def test_a_forward_that_was_replaced_before_is_said_to_be_uncounted(inputs):
    host, ours = hosts("diffusers")
    one = ours.transformer_blocks[0]
    original = one.forward
    one.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.0 would not run fused: its forward was replaced"
    ):
        fluxfast.accelerate(ours, strict=True)
    report = fluxfast.accelerate(ours)
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (4, 0, 0) and "the calls of 1 block are unknown" in str(report)


@every_layout
def test_compiled_blocks_are_ours_and_not_counted(inputs, layout):
    host, ours = hosts(layout)
    report = fluxfast.accelerate(ours, strict=True)
    torch._dynamo.reset()
    # strict and a full graph: neither the host's forward nor the counting may be in it
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert relative_error(output(compiled, inputs), output(host, inputs)) < FP32
    assert counts(report) == (0, 0, 0)
    assert "5 blocks compiled, whose calls are not counted, run op by op" in str(report)
    torch._dynamo.reset()
