"""A Triton kernel with everything that it is launched with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

MAX_REGISTERS = 128
"""Of a thread, for 16 warps a multiprocessor. Unbounded, the assembler aims lower and spills to get there."""


@dataclass(frozen=True)
class Launch:
    """One launch, kept so that steps repeat it and so that it can be compiled where there is no GPU.

    Attributes:
        kernel: the jitted function.
        programs: size of the one-dimensional grid.
        arguments: of the kernel, by name: tensors, numbers, None for what is absent.
        num_warps: warps a program.
        max_registers: of a thread.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int = MAX_REGISTERS

    def __call__(self) -> None:
        """Put the launch on the current stream."""
        self.kernel[(self.programs,)](**self.arguments, **self.options(nvidia=torch.version.hip is None))

    def options(self, *, nvidia: bool) -> dict[str, int]:
        """What the compiler is told; others than NVIDIA's take no bound on registers."""
        return {"num_warps": self.num_warps} | ({"maxnreg": self.max_registers} if nvidia else {})

    def with_arguments(self, **arguments: Any) -> Launch:  # noqa: ANN401 - whatever the kernel takes
        """The same launch with some arguments changed."""
        return replace(self, arguments=self.arguments | arguments)


def device_scope(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device: Triton takes the current one, not that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def signed_word(word: int) -> int:
    """The int32 with the bits of a 32-bit word: torch and Triton carry words as int32."""
    return word - (1 << 32) if word >= 1 << 31 else word
