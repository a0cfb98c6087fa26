"""What of a step on meta tensors counts as alive, and when."""

import torch

from fluxfast.memory.live_bytes import UNIT, LiveBytes, rounded

MIB = 2**20


def mib(count):
    """A tensor of so many MiB."""
    return torch.empty(count, MIB // 4, device="meta")


def test_what_is_freed_is_no_longer_alive():
    with LiveBytes() as live:
        x = mib(1)
        y = x + 1
        assert live.live == 2 * MIB
        del y
        assert live.live == MIB
        # the sum is there before its inputs are gone
        x = x * 2
        assert (live.live, live.peak) == (MIB, 2 * MIB)
    assert live.peak == 2 * MIB


def test_a_view_keeps_all_of_its_memory():
    with LiveBytes() as live:
        x = mib(4)
        part = x[0, :8].view(2, 4)
        del x
        assert live.live == 4 * MIB
        del part
        assert live.live == 0


def test_what_autograd_saves_is_alive_until_backward():
    with LiveBytes() as live:
        x = mib(1).requires_grad_()
        # exp keeps its result, the sum keeps nothing
        y = x.exp().sum()
        assert live.live == 2 * MIB + UNIT
        y.backward()
        assert live.live == 2 * MIB + UNIT
        assert live.peak >= 3 * MIB
        del x, y
        assert live.live == 0


def test_in_place_and_out_make_nothing():
    with LiveBytes() as live:
        x = mib(1)
        x.add_(1).mul_(2)
        torch.add(x, x, out=x)
        assert (live.live, live.peak) == (MIB, MIB)


def test_sizes_are_rounded_as_the_allocator_rounds_them():
    assert [rounded(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with LiveBytes() as live:
        x = torch.empty(3, device="meta")
        assert live.live == UNIT
    del x


def test_held_and_ignored_tensors():
    mine, hosts = mib(1), mib(2)
    with LiveBytes() as live:
        live.ignore([hosts])
        live.hold([mine, mine.view(-1), hosts])
        hosts.view(-1)
        assert (live.live, live.peak) == (MIB, MIB)


def test_attentions_backward_takes_an_fp32_copy_of_dq():
    q, out, lse = (
        torch.empty(1, 2, 200, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)
    )
    lse = torch.empty(1, 2, 200, device="meta")
    seed = torch.empty((), dtype=torch.uint64, device="meta")
    with LiveBytes() as live:
        live.hold([q, out, lse, seed])
        before = live.live
        torch.ops.aten._scaled_dot_product_flash_attention_backward(
            out, q, q, q, out, lse, None, None, 200, 200, 0.0, False, seed, seed
        )
    grads = 3 * rounded(2 * 200 * 64 * 2)
    # 200 tokens are two tiles of 128
    assert live.peak - before == grads + 2 * 256 * 64 * 4 + 2 * 256 * 4


def test_a_peak_can_begin_anew():
    with LiveBytes() as live:
        x = mib(1)
        y = x + 1
        del y
        assert live.peak == 2 * MIB
        assert live.restart() == live.peak == MIB
        del x
        mib(3)
        assert (live.live, live.peak) == (0, 3 * MIB)
