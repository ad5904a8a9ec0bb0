"""Of `step.device_memory`, for the Triton steps beside this file."""

from fasttower_kernels.step.device_memory import check_device_memory, listed, resident_bytes

__all__ = ["check_device_memory", "listed", "resident_bytes"]
