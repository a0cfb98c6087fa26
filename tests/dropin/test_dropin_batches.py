"""Hosts' operations broadcast a stream or a vector of one sample; our kernels read rows."""

import pytest
from dropin_cases import counts, every_kind, hosts, hosts_with_peft
from dropin_hosts import assert_equal

import fluxfast
from support import make_inputs

# the inputs that are of one sample, where the others are of two
ONE = {
    "a text": ("encoder_hidden_states",),
    "a picture and a text": ("hidden_states", "encoder_hidden_states"),
    "a time": ("pooled_projections", "timestep"),
}


@every_kind
@pytest.mark.parametrize("one", ONE)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_of_one_sample_is_repeated(kind, one, recompute):
    host, ours = hosts_with_peft(kind)
    report = fluxfast.accelerate(ours, recompute=recompute)
    inputs = make_inputs(2, 3, 5, guidance=False)
    inputs |= {name: inputs[name][:1] for name in ONE[one]}
    assert_equal(host, ours, inputs)
    assert counts(report) == (5, 0, 0)


def test_batches_that_do_not_fit_are_an_error():
    host, ours = hosts("diffusers")
    fluxfast.accelerate(ours)
    inputs = make_inputs(3, 3, 5, guidance=False)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:2]
    for model in (host, ours):
        with pytest.raises(RuntimeError):
            model(**inputs)
