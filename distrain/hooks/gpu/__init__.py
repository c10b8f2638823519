"""GPU telemetry by NVML."""
