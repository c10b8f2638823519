"""Names of scalars that more than one module uses, and the prefixes that group them."""

PERF = "perf/"
GPU = "gpu/"
MEMORY = "memory/"
STRAGGLER = "straggler/"
GUARD = "guard/"

STEP_S = PERF + "step_s"
ETA_S = PERF + "eta_s"
LR = "lr"
GRAD_NORM = "grad_norm"
SKIPPED_UPDATE = "skipped_update"

NONDETERMINISTIC_PREFIXES = (PERF, GPU, MEMORY, STRAGGLER)
"""Timing and hardware metrics: they differ between equal runs, so no digest includes them."""

DIAGNOSTIC_PREFIXES = (GUARD, STRAGGLER, PERF)
"""Scalars about the machines, which tables of runs show on request only."""
