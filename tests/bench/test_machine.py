"""What the machine is and reaches, and whether others use it."""

import math

import pytest

from sparsetrain.bench import load, machine


def test_limits_are_positive_on_every_instruction_set(isa):
    found = machine.limits(2, seconds=1e-4)
    assert found["threads"] == 2
    assert [level["name"] for level in found["levels"]][-1] == "memory"
    assert len(found["levels"]) >= 2
    numbers = [found["fma_gflops"], *(level[k] for level in found["levels"] for k in ("read_gbs", "update_gbs"))]
    assert all(math.isfinite(n) and n > 0 for n in numbers)


def test_settle_ends_when_the_threads_are_as_fast_as_they_were_or_patience_ends():
    slow, impossible = {"threads": 2, "fma_gflops": 1e-3}, {"threads": 2, "fma_gflops": 1e9}
    assert machine.settle(slow)
    assert not machine.settle(impossible, patience=0.01)
    assert machine.settle({**impossible, "threads": 1})


def cache(folder, index, **files):
    place = folder / f"index{index}"
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(f"{text}\n")


def test_caches_as_linux_tells_them(tmp_path):
    cache(tmp_path, 0, level=1, type="Data", size="48K", shared_cpu_list="0-1")
    cache(tmp_path, 1, level=1, type="Instruction", size="32K", shared_cpu_list="0-1")
    cache(tmp_path, 2, level=2, type="Unified", size="2M", shared_cpu_list="0")
    cache(tmp_path, 3, level=3, type="Unified", size="32768K", shared_cpu_list="0-3,8-11")
    cache(tmp_path, 4, level=4, type="Unified")
    assert machine.caches(tmp_path) == [("L1d", 48 << 10, 2), ("L2", 2 << 20, 1), ("L3", 32 << 20, 8)]


def test_a_system_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / "absent")
    assert machine.caches() == []
    about = machine.describe()
    assert about["caches"] == {} and about["cpu"] and not about["virtual"]
    found = machine.limits(1, seconds=1e-4)
    assert [level["name"] for level in found["levels"]] == ["L1d", "L2", "memory"]


def test_arm_cores_have_numbers(monkeypatch):
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"CPU implementer": "0x41", "CPU part": "0xd40"})
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.describe()["cpu"] == "aarch64 0x41/0xd40"


def test_load_is_measured():
    taken = load.idle(0.02)
    assert taken["seconds"] >= 0.02
    assert taken["others"] >= 0


def test_load_is_unknown_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "Path", lambda name: tmp_path / "absent")
    assert load.Load().taken() is None
    assert load.too_busy(None) is None


@pytest.mark.parametrize("others, stolen, busy", [(0.05, 0.0, False), (0.06, 0.0, True), (0.0, 0.5, True)])
def test_busy_is_more_than_a_twentieth_of_a_core(others, stolen, busy):
    line = load.too_busy({"others": others, "stolen": stolen, "seconds": 1.0, "load_average": 0.3})
    assert (line is not None) == busy
    assert not busy or f"others took {others:.0%} of a core and the hypervisor {stolen:.0%}" in line
