"""GPUs by NVIDIA's own binding, against a stand-in of the driver's library."""

import os

import pytest
from stand_in import with_stand_in

from distrain.hooks.gpu.messages import throttle_words, xid_words

A = {
    "gpu0_uuid": "GPU-8f2c1111",
    "gpu0_name": "Card A",
    "gpu0_utilization": 37,
    "gpu0_memory_busy": 12,
    "gpu0_memory_used": 3 * 2**30,
    "gpu0_memory_total": 80 * 2**30,
    "gpu0_power": 250_500,
    "gpu0_energy": 1_000_000,
    "gpu0_temperature": 61,
    "gpu0_sm_clock": 1410,
    "gpu0_memory_clock": 1593,
    "gpu0_throttle": 0x44,
    "gpu0_ecc": 2,
    "gpu0_pcie_tx": 1500,
    "gpu0_pcie_rx": 2500,
    "gpu0_nvlink_tx": 1000,
    "gpu0_nvlink_rx": 2000,
}
B = {
    "gpu1_uuid": "GPU-8f2c2222",
    "gpu1_name": "Card B",
    "gpu1_utilization": 5,
    "gpu1_memory_busy": 1,
}
MIG = {
    "gpu2_uuid": "GPU-aaaa",
    "gpu2_name": "Card C",
    "gpu2_mig": 1,
    "gpu2_temperature": 50,
    "gpu2_power": 400_000,
    "gpu2_mig0.uuid": "MIG-0001",
    "gpu2_mig0.memory_total": 10 * 2**30,
    "gpu2_mig0.memory_used": 2**30,
    "gpu2_mig2.uuid": "MIG-0003",
}
pytestmark = pytest.mark.ranks


def read_all(rank, driver):
    from distrain.gpus.nvml import Nvml

    driver.says(gpus=2, **A, **B)
    nvml = Nvml()
    [[a], [b]] = nvml.gpus()
    first = [gpu.read(100.0) for gpu in (a, b)]
    before = a.energy_j
    driver.says(gpus=2, **A | {"gpu0_energy": 1_750_000, "gpu0_nvlink_tx": 501_000}, **B)
    second = a.read(102.0)
    nvml.close()
    return first, before, a.energy_j, b.energy_j, second, driver.calls()


def test_what_a_card_says_and_what_it_lacks(libraries):
    [(first, before, energy_j, other_j, second, calls)] = with_stand_in(libraries, read_all)
    assert first[0].values == {
        "utilization_percent": 37,
        "memory_busy_percent": 12,
        "memory_used_mib": 3072,
        "memory_total_mib": 81920,
        "power_w": 250.5,
        "temperature_c": 61,
        "sm_clock_mhz": 1410,
        "memory_clock_mhz": 1593,
        "ecc_uncorrected": 2,
        "pcie_tx_mb_per_s": 1.5,
        "pcie_rx_mb_per_s": 2.5,
    }
    assert first[0].throttle == 0x44
    assert first[1].values == {"utilization_percent": 5, "memory_busy_percent": 1}
    assert first[1].throttle is None
    assert (before, energy_j, other_j) == (0.0, 750.0, None)
    assert second.values["nvlink_tx_mb_per_s"] == 256.0  # 500,000 KiB in 2 s
    assert second.values["nvlink_rx_mb_per_s"] == 0.0
    assert calls == ["init", "shutdown"]


def read_old(rank, driver):
    from distrain.gpus.nvml import Nvml

    nvml = None
    found = []
    for now_s, power in ((0.0, 100_000), (2.0, 300_000), (3.0, 300_000)):
        driver.says(gpus=1, **A | {"gpu0_power": power})
        nvml = nvml or Nvml()
        gpu = found[0][0] if found else nvml.gpus()[0][0]
        gpu.read(now_s)
        found.append((gpu, gpu.energy_j))
    nvml.close()
    return [energy_j for _, energy_j in found]


def test_without_a_counter_energy_is_power_times_time(libraries):
    # pynvml raises FunctionNotFound for the symbol that this library lacks
    assert with_stand_in(libraries, read_old, old=True) == [[0.0, 400.0, 700.0]]


def see(rank, driver, names):
    from distrain.gpus.nvml import Nvml
    from distrain.gpus.visible import visible

    driver.says(gpus=3, **A, **B, **MIG)
    nvml = Nvml()
    gpus = nvml.gpus()
    found = [[gpu.uuid[-4:] for gpu in visible(gpus, name)] for name in names]
    slices = gpus[2]
    reading = slices[0].read(0.0)
    nvml.close()
    return found, reading, slices[0].index, slices[0].energy_j


def test_cuda_visible_devices_and_mig(libraries):
    cases = {
        None: ["1111", "2222", "0001", "0003"],
        "": [],
        "-1": [],
        "0,-1,1": ["1111"],
        "0,\u00b2": ["1111"],  # a digit, but no number
        "NoDevFiles": [],
        "1,0": ["2222", "1111"],
        " 1 , 0 ": ["2222", "1111"],
        "0,9,1": ["1111"],
        "0,0": [],
        "GPU-8f2c2": ["2222"],
        "GPU-8f2c": [],  # two begin so
        "GPU-8f2c1111,nonsense,1": ["1111"],
        "2": ["0001"],  # CUDA takes the first slice
        "MIG-0003,GPU-8f2c1": ["0003", "1111"],
        "MIG-00": [],
    }
    [(found, reading, index, energy_j)] = with_stand_in(libraries, see, list(cases))
    assert dict(zip(cases, found, strict=True)) == cases
    # memory of the slice, temperature of the whole card, and no power, which others use too
    assert reading.values == {
        "memory_used_mib": 1024,
        "memory_total_mib": 10240,
        "temperature_c": 50,
    }
    assert (index, energy_j) == (2, None)


def choose(rank, driver, cases):
    from distrain.gpus.nvml import Nvml
    from distrain.gpus.visible import candidates, environment_for, most_ranks
    from distrain.launch.gpus import count_gpus

    found = []
    for gpus, order, names, num in cases:
        says = {"gpu0_uuid": "GPU-0", "gpu0_name": "A", "gpu1_uuid": "GPU-1", "gpu1_name": "A"}
        if gpus == "mixed":
            says["gpu1_name"] = "B"
        if gpus == "one in MIG mode":
            says |= {"gpu1_mig": 1, "gpu1_mig0.uuid": "MIG-1", "gpu1_mig1.uuid": "MIG-2"}
        driver.says(gpus=2, **says)
        for name, value in (("CUDA_VISIBLE_DEVICES", names), ("CUDA_DEVICE_ORDER", order)):
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        nvml = Nvml()
        devices = nvml.gpus()
        usable = candidates(devices)
        assert count_gpus() == most_ranks(usable)
        chosen = usable[-num:] if num else usable
        found.append(
            (
                [gpu.uuid for gpu in usable],
                most_ranks(usable),
                environment_for(chosen, devices).get("CUDA_VISIBLE_DEVICES"),
            )
        )
        nvml.close()
    return found


def test_what_ranks_can_use_and_how_they_see_it_alone(libraries):
    mig = "one in MIG mode"
    cases = {  # GPUs, CUDA_DEVICE_ORDER, CUDA_VISIBLE_DEVICES, how many of the last are chosen
        ("same", None, None, 0): (["GPU-0", "GPU-1"], 2, None),  # as it is
        ("same", None, None, 1): (["GPU-0", "GPU-1"], 2, "GPU-1"),
        ("same", None, "1,0", 0): (["GPU-1", "GPU-0"], 2, None),
        ("same", None, "1,0", 1): (["GPU-1", "GPU-0"], 2, "GPU-0"),
        ("same", None, "", 0): ([], 0, None),
        # CUDA may count mixed GPUs in another order than NVML
        ("mixed", None, None, 0): (["GPU-0", "GPU-1"], 2, None),
        ("mixed", None, "0", 0): (["GPU-0"], 1, "GPU-0"),
        ("mixed", None, "GPU-0", 0): (["GPU-0"], 1, None),
        ("mixed", "PCI_BUS_ID", "0", 0): (["GPU-0"], 1, None),
        # whole GPUs first: CUDA would enumerate the MIG device alone
        (mig, None, None, 0): (["GPU-0"], 1, "GPU-0"),
        (mig, None, "1", 0): (["MIG-1"], 1, None),
        (mig, None, "MIG-1,MIG-2", 1): (["MIG-1", "MIG-2"], 1, "MIG-2"),
    }
    [found] = with_stand_in(libraries, choose, list(cases))
    assert dict(zip(cases, found, strict=True)) == cases


def use(rank, driver):
    from distrain.gpus.idle import use_of
    from distrain.gpus.nvml import Nvml

    found = []
    for values in (
        {"processes": f"{os.getpid()}:5"},  # this process does not count
        {"processes": "999999998:1073741824 999999999"},
        {"memory_used": 2**30, "memory_total": 8 * 2**30},
        {"memory_used": 2**30 + 2**20, "memory_total": 8 * 2**30},
        {"memory_used": 2 * 2**30, "memory_total": 100 * 2**30},
        {"lost": 1},
        {"error": 999},  # unknown error
        {"error": 2},  # invalid argument: the handle is that of another driver
        {"processes": f"{os.getpid()}:{5 << 30}", "memory_used": 6 << 30, "memory_total": 8 << 30},
        {"processes": f"{os.getpid()}:{2 << 30}", "memory_used": 6 << 30, "memory_total": 8 << 30},
    ):
        driver.says(gpus=1, gpu0_uuid="GPU-0", gpu0_name="A")
        nvml = Nvml()
        [[gpu]] = nvml.gpus()
        says = {f"gpu0_{name}": value for name, value in values.items()}
        driver.says(gpus=1, gpu0_uuid="GPU-0", gpu0_name="A", **says)
        found.append(use_of(gpu))
        if "999999998" in str(values):
            found.append(gpu.processes())
        nvml.close()
    return found


@pytest.mark.parametrize("old", [False, True])  # that of old drivers is another function
def test_when_a_gpu_is_idle(libraries, old):
    memory = "memory in use by an unknown process"
    assert with_stand_in(libraries, use, old=old) == [
        [
            "",
            "used by process 999999998 and process 999999999",
            {999999998: 1024.0, 999999999: 0.0},
            "",
            memory,
            "",
            "does not respond",
            "does not respond",
            "does not respond",
            "",
            memory,
        ]
    ]


def lose(rank, driver):
    from distrain.gpus.nvml import GpuLost, NoDriver, Nvml

    driver.says()
    with pytest.raises(NoDriver, match="Driver Not Loaded"):
        Nvml()
    driver.says(gpus=2, **A, **B)
    nvml = Nvml()
    [[a], [b]] = nvml.gpus()
    nvml.listen([a, b])
    assert nvml.xids() == []
    driver.says(gpus=2, **A, **B, gpu1_xid="79 2")
    xids = [(gpu.uuid, number) for gpu, number in nvml.xids()]
    assert nvml.xids() == []
    driver.says(gpus=2, **A, **B, gpu1_lost=1)
    a.read(0.0)
    with pytest.raises(GpuLost):
        b.read(0.0)
    nvml.close()
    return xids


def test_a_gpu_that_vanishes_and_xids(libraries):
    assert with_stand_in(libraries, lose) == [[("GPU-8f2c2222", 79), ("GPU-8f2c2222", 79)]]


def test_words():
    assert throttle_words(0x44) == "its power limit and its temperature (hardware)"
    assert throttle_words(0x1) == ""
    assert xid_words(79) == "Xid 79: the GPU has fallen off the bus"
    assert xid_words(1000).startswith("Xid 1000: see ")
