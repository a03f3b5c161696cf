"""Errors that the machine raises. Each message names the kernel, the source line and the tensor, or "shared memory"."""

from __future__ import annotations


class PtxError(Exception):
    """Fault in a kernel, or something that the machine cannot execute."""


class UnknownInstructionError(PtxError, NotImplementedError):
    """Opcode or qualifier outside the table: executing the instruction without it would be a guess."""


class OutOfBoundsError(PtxError):
    """Access outside every tensor, or outside the shared memory of the launch."""


class MisalignedError(PtxError):
    """Address that is no multiple of the bytes accessed at once (PTX ISA 5.3)."""


class RaceError(PtxError):
    """Race: two warps touch a byte, one of them writing, with no barrier between."""


class InFlightError(PtxError):
    """Use of an asynchronous copy or product that has not been waited for."""


class UninitialisedError(PtxError):
    """Use of a register, a byte of shared memory or a cell of tensor memory that was never written."""


class UnsynchronisedError(PtxError):
    """Barrier, fence or group that the instruction set asks for and that is missing or cannot complete."""


class UndefinedError(PtxError):
    """Operation whose result the instruction set leaves open: division by zero, a shuffle from an inactive lane."""
