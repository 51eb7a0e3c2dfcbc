"""What a process on a CPU takes beside its tensors."""

# Both are measured, see "True size without a GPU" in docs/performance.md.
LIBRARY_BYTES = 550 * 2**20  # PyTorch, diffusers and the others, once they are imported and used
# of what a step makes and frees: glibc keeps it, in holes that fit nothing, and oneDNN's own copies
KEPT_SHARE = 0.5


def resident_bytes(phases: dict[str, int], held_bytes: int) -> dict[str, int]:
    """The memory of the process in each phase, by the bytes of its tensors.

    held_bytes: of the denoiser and its optimizer, which stay where they are while it trains.
    """
    resident = {phase: size + LIBRARY_BYTES for phase, size in phases.items()}
    resident["train"] += int(KEPT_SHARE * max(0, phases["train"] - held_bytes))
    return resident
