"""Names of NVML throttle reasons and Xid errors."""

from __future__ import annotations

THROTTLE_BITS = {
    "power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "thermal": 0x20 | 0x40,  # by software, by hardware
    "power_brake": 0x80,
}
"""Bits of nvmlClocksEventReason* (nvml.h), without idle (0x1) and clock settings (0x2, 0x100)."""

USUAL = THROTTLE_BITS["power_cap"] | THROTTLE_BITS["sync_boost"]
"""Throttle bits of a healthy card under full load."""

_THROTTLE_WORDS = {
    0x4: "its power limit",
    0x8: "the hardware (temperature or power)",
    0x10: "the slowest GPU of its sync boost group",
    0x20: "its temperature (software)",
    0x40: "its temperature (hardware)",
    0x80: "the power supply's brake",
}

# https://docs.nvidia.com/deploy/xid-errors, those of compute jobs
_XID_WORDS = {
    8: "GPU stopped processing",
    13: "graphics engine exception, often an index out of bounds in a kernel",
    31: "memory page fault, often an illegal address in a kernel",
    32: "invalid or corrupted push buffer stream",
    38: "driver firmware error",
    43: "GPU stopped processing, often after an error of the program",
    45: "channels were cleaned up after an earlier error, or the process was killed",
    48: "double bit ECC error",
    61: "internal micro-controller breakpoint or warning",
    62: "internal micro-controller halt",
    63: "ECC page retirement or row remapping was recorded",
    64: "ECC page retirement or row remapping failed",
    68: "video processor exception",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "high rate of single bit ECC errors",
    94: "contained memory error: this process ends, others continue",
    95: "uncontained memory error: the GPU needs a reset",
    109: "context switch timeout",
    119: "GPU system processor (GSP) timeout",
    120: "GPU system processor (GSP) failed",
    121: "corrected error of the chip-to-chip link",
    140: "uncorrected ECC error",
}


def throttle_values(bits: int) -> dict[str, float]:
    """Return the scalars of throttle bits, 0 or 1 each; `throttled` is any of them."""
    reasons = {f"throttle_{name}": float(bool(bits & bit)) for name, bit in THROTTLE_BITS.items()}
    return {"throttled": max(reasons.values()), **reasons}


def throttle_words(bits: int) -> str:
    """Return the throttle reasons: `throttle_words(0x44)` names power limit and temperature."""
    return " and ".join(words for bit, words in _THROTTLE_WORDS.items() if bits & bit)


def xid_words(number: int) -> str:
    """Return an Xid error in words: `xid_words(79)` is "Xid 79: the GPU has fallen off the bus"."""
    return f"Xid {number}: {_XID_WORDS.get(number, 'see docs.nvidia.com/deploy/xid-errors')}"
