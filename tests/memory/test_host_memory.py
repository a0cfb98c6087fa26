"""Pinned host memory with a made-up driver: what is asked of it, and what a refusal says."""

import gc

import pytest
import torch

from fluxfast.memory.host import HostMemory, locked_memory_limit


class Driver:
    """Registers memory up to a limit."""

    def __init__(self, limit=float("inf")):
        self.limit, self.pinned, self.calls = limit, {}, 0

    def pin(self, address, nbytes):
        self.calls += 1
        if sum(self.pinned.values()) + nbytes > self.limit:
            return "out of memory"
        self.pinned[address] = nbytes
        return None

    def unpin(self, address):
        del self.pinned[address]


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 100_000])
def test_exactly_as_much_as_was_asked(nbytes):
    driver = Driver()
    memory = HostMemory(driver.pin, driver.unpin)
    buffer = memory.allocate(nbytes)
    assert buffer.shape == (nbytes,) and buffer.dtype == torch.uint8
    assert driver.pinned == {buffer.data_ptr(): nbytes}
    assert buffer.data_ptr() % 4096 == 0
    assert memory.nbytes == memory.pinned_bytes == nbytes
    assert memory.shortfall is None
    assert not buffer.any()
    buffer.fill_(7)
    assert int(buffer.long().sum()) == 7 * nbytes


def test_what_the_limit_forbids_is_said():
    driver = Driver(limit=2 << 20)
    memory = HostMemory(driver.pin, driver.unpin)
    buffers = [memory.allocate(1 << 20) for _ in range(4)]
    assert memory.pinned_bytes == 2 << 20 and memory.nbytes == 4 << 20
    # once refused, it is not asked again
    assert driver.calls == 3
    for part in ("0.00 of 0.00 GiB", "out of memory", "ulimit -l", locked_memory_limit()):
        assert part in memory.shortfall
    for buffer in buffers:
        buffer.fill_(1)


def test_memory_outlives_its_pinning():
    driver = Driver()
    memory = HostMemory(driver.pin, driver.unpin)
    buffer = memory.allocate(5000).fill_(3)
    memory.release()
    memory.release()
    assert not driver.pinned
    del memory
    gc.collect()
    assert int(buffer.long().sum()) == 15000


def test_nothing_stays_pinned_by_accident():
    driver = Driver()
    memory = HostMemory(driver.pin, driver.unpin)
    memory.allocate(5000)
    assert driver.pinned
    del memory
    gc.collect()
    assert not driver.pinned


def test_without_a_driver_it_is_ordinary_memory():
    memory = HostMemory()
    memory.allocate(100)
    assert memory.pinned_bytes == 0 and memory.shortfall is None
    memory.release()
