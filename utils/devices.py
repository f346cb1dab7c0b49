"""The device to compute on, in what precision, and what happens where its memory runs out."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from utils.errors import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """A device that has been tried out; on GPUs fp32 then means fp32, in convolutions too.

    Args:
        name: cpu, cuda, cuda:1, ...; None takes the first GPU where there is one, else the CPU.
        local_rank: of this process among those of one machine; each then takes the GPU of its rank, whatever the
            number in `name`.

    Raises:
        UserError: for a device that PyTorch does not know or cannot use here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and local_rank is not None:
            if local_rank >= (count := torch.cuda.device_count()):
                raise UserError(f"process {local_rank} of this machine finds no GPU for itself, since there are "
                                f"{count}; start fewer processes, or use --device cpu")
            device = torch.device("cuda", local_rank)
        torch.zeros(1, device=device).item()
        torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions would have 10 bits of mantissa, as fp16 has
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # which, depends on the build
        raise UserError(f"--device {name} cannot be used on this machine; leave it out, or say cpu") from error
    return device


def computing_in(precision: str, device: torch.device | str) -> torch.autocast:
    """In what follows the network computes in fp32, which is as if nothing were said, or bf16 or fp16 by autocast."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "fp32")


@contextmanager
def memory_suffices(purpose: str) -> Iterator[None]:
    """Turn running out of memory, on whatever device, into the UserError "there is not enough memory <purpose>"."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch gives a GPU's exhaustion a class of its own, but the CPU's is told by its message alone.
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if exhausted or any(words in str(error) for words in ("allocate memory", "not enough memory", "overflowed")):
            raise UserError(f"there is not enough memory {purpose}") from error
        raise
