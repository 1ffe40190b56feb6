"""What a checked execution raises. Nothing in this package prints a failure or returns one."""


class SimulationError(Exception):
    """The kernel did something that a GPU would not forgive; the message ends with the instruction."""

    instruction: str | None = None

    def __str__(self) -> str:
        return super().__str__() + (f"\n  at: {self.instruction[:300]}" if self.instruction else "")


class Unsupported(SimulationError):
    """The simulator does not know an instruction that was executed, so it can say nothing of the kernel."""


class OutOfBounds(SimulationError):
    """An address outside every argument, outside the shared allocation, or misaligned."""


class Race(SimulationError):
    """Two warps, or two blocks, touched the same bytes and nothing ordered them."""


class Hazard(SimulationError):
    """An asynchronous copy or product was used, or its operands overwritten, before its wait."""


class Deadlock(SimulationError):
    """A barrier that cannot complete."""
