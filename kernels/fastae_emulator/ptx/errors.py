"""What the machine refuses. Each message names the kernel, the source line and the tensor, or "shared memory"."""

from __future__ import annotations


class PtxError(Exception):
    """Something in a kernel that is wrong, or that the machine cannot execute."""


class UnknownInstructionError(PtxError, NotImplementedError):
    """An opcode or a qualifier outside the table: executing it without it would be a guess."""


class OutOfBoundsError(PtxError):
    """A byte outside every tensor, or outside the shared memory of the launch."""


class MisalignedError(PtxError):
    """An address that is no multiple of the bytes accessed at once (PTX ISA 5.3)."""


class RaceError(PtxError):
    """Two warps touch a byte, one of them writing, with no barrier between."""


class InFlightError(PtxError):
    """An asynchronous copy or product that nobody has waited for yet."""


class UninitialisedError(PtxError):
    """A register, a byte of shared memory or a cell of tensor memory is read before anything was written there."""


class UnsynchronisedError(PtxError):
    """A barrier, fence or group that the instruction set asks for is missing or cannot complete."""


class UndefinedError(PtxError):
    """An operation whose result the instruction set leaves open: division by zero, a shuffle from an idle lane."""
