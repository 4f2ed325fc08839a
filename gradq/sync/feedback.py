"""Error feedback: what a rank failed to send in one step, it adds in the next.

Two kinds of residuals, both keyed by parameter name and so indifferent to DDP's buckets: the *local* residual
(what this rank's phase 1 lost; as large as the gradient) and the *shard* residual (what phase 2 lost of the
means this rank owns; 1/W of it).

Each residual has two buffers. A step reads one and writes the other, and `commit` makes the written ones
current once every gradient of the step is known to be finite; otherwise `discard` leaves everything as it
was, exactly, on every rank. Until the next step writes, `revert` takes a commit back: for gradients that
nobody applied. All that costs one more copy of the gradients in memory, and no time.

Residuals are fp32. bf16 halves the memory, and then what one step loses is remembered to 8 bits only: an
error of about 2**-9 of the residual every step, which is not fed back.

References:
    Seide et al., "1-bit stochastic gradient descent", Interspeech 2014.
    Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018.
    Tang et al., "DoubleSqueeze", ICML 2019 (a residual on both sides).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradq.errors import ConfigError
from gradq.options import RESIDUAL_DTYPES

__all__ = ["Feedback", "Residuals"]


@dataclass
class _Pair:
    """Two buffers of one parameter; `current` is the valid one.

    Attributes:
        written: whether the step under way has written the other one.
        committed: whether the last step's was made current; the other buffer still holds the one before.
        carried: what is read in the place of the valid one, for the rest of the step.
    """

    buffers: tuple[Tensor, Tensor]
    current: int = 0
    written: bool = False
    committed: bool = False
    carried: Tensor | None = None


class Residuals:
    """Residuals of one kind, by parameter name.

    Args:
        dtype: "fp32" or "bf16".

    Attributes:
        device: where residuals are made; the CPU unless it is set before the first one.

    Raises:
        ConfigError: another dtype.
    """

    def __init__(self, dtype: str = "fp32") -> None:
        self.device = torch.device("cpu")
        if dtype not in RESIDUAL_DTYPES:
            raise ConfigError(f"residual dtype {dtype!r}: choose from {', '.join(RESIDUAL_DTYPES)}")
        self._dtype = RESIDUAL_DTYPES[dtype]
        self._pairs: dict[str, _Pair] = {}
        self._scratch: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    @contextmanager
    def update(self, name: str, numel: int, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The old and the new residual of elements [start, stop), fp32, to read and to write.

        Args:
            name: parameter.
            numel: elements of the whole residual; it starts as zeros.
            start: first element.
            stop: one past the last element.
        """
        pair = self._pairs.get(name)
        if pair is None:
            pair = self._pairs[name] = _Pair((self._zeros(numel), self._zeros(numel)))
        valid = pair.buffers[pair.current] if pair.carried is None else pair.carried
        old, new = valid[start:stop], pair.buffers[1 - pair.current][start:stop]
        pair.written = True
        if self._dtype == torch.float32:
            yield old, new
            return
        if self._scratch[0].numel() < stop - start:
            self._scratch = (
                torch.empty(stop - start, device=self.device),
                torch.empty(stop - start, device=self.device),
            )
        old_fp32, new_fp32 = (scratch[: stop - start] for scratch in self._scratch)
        old_fp32.copy_(old)
        yield old_fp32, new_fp32
        new.copy_(new_fp32)

    def current(self, name: str) -> Tensor:
        """The committed residual of a parameter, [numel]."""
        pair = self._pairs[name]
        return pair.buffers[pair.current]

    def names(self) -> list[str]:
        """The parameters that have a residual, sorted."""
        return sorted(self._pairs)

    def replace(self, name: str, value: Tensor) -> None:
        """Replace the residual of a parameter by value [numel]."""
        buffer = value.detach().reshape(-1).to(self.device, self._dtype).clone()
        self._pairs[name] = _Pair((buffer, torch.zeros_like(buffer)))

    def commit(self) -> None:
        """Make what this step wrote current."""
        for pair in self._pairs.values():
            pair.committed = pair.written
            if pair.written:
                pair.current = 1 - pair.current
                pair.written = False
            pair.carried = None

    def discard(self) -> None:
        """Forget what this step wrote."""
        for pair in self._pairs.values():
            pair.written = pair.committed = False
            pair.carried = None

    def carry(self) -> None:
        """Read from now on what this step has written so far; it is committed or discarded as a whole.

        For a parameter that is encoded more than once in a step. Costs a copy of its residual.
        """
        for pair in self._pairs.values():
            if pair.written:
                pair.carried = pair.buffers[1 - pair.current].clone()

    def revert(self, names: Iterable[str] | None = None) -> None:
        """Take back the last `commit`, until the next step writes; of the named parameters, or of all."""
        for name in list(self._pairs if names is None else names):
            pair = self._pairs.get(name)
            if pair is not None and pair.committed:
                pair.current = 1 - pair.current
                pair.committed = False

    def revert_where(self, name: str, unused: Tensor) -> None:
        """As `revert`, if unused, a tensor of one bool, is true, without asking the device."""
        pair = self._pairs.get(name)
        if pair is not None and pair.committed:
            new, old = pair.buffers[pair.current], pair.buffers[1 - pair.current]
            torch.where(unused, old, new, out=new)

    def select(self, verdict: Tensor) -> None:
        """Where verdict, a tensor of one bool, is false, replace what this step wrote by what it read.

        So a step that the host does not know the verdict of can be committed without asking the device.
        """
        for pair in self._pairs.values():
            if pair.written:
                old, new = pair.buffers[pair.current], pair.buffers[1 - pair.current]
                torch.where(verdict, new, old, out=new)

    def clear(self) -> None:
        """Forget everything."""
        self._pairs.clear()

    def freeze(self) -> None:
        """Keep what is valid, to be read, and give back the memory that a step would write."""
        for name, pair in self._pairs.items():
            valid = pair.buffers[pair.current]
            self._pairs[name] = _Pair((valid, valid))

    def keep(self, kept: set[str]) -> list[str]:
        """Drop the residuals of all other parameters; returns the names dropped."""
        dropped = [name for name in self._pairs if name not in kept]
        for name in dropped:
            del self._pairs[name]
        return sorted(dropped)

    def nbytes(self) -> int:
        """Memory held, both buffers."""
        return sum(2 * pair.buffers[0].nbytes for pair in self._pairs.values())

    def _zeros(self, numel: int) -> Tensor:
        return torch.zeros(numel, dtype=self._dtype, device=self.device)


@dataclass
class Feedback:
    """Both kinds of residuals of one rank, and the bases of `collectives.low_rank`.

    Bases are no residuals (and never bf16): all ranks have the same. But a step reads and writes them in the
    same way, and one that is not finite must leave them as they were too.
    """

    dtype: str = "fp32"
    local: Residuals = field(init=False)
    shard: Residuals = field(init=False)
    bases: Residuals = field(init=False)

    def __post_init__(self) -> None:
        self.local = Residuals(self.dtype)
        self.shard = Residuals(self.dtype)
        self.bases = Residuals()

    def finish(self, verdict: bool | Tensor) -> None:
        """End a step: commit if it may enter the residuals, else discard.

        Args:
            verdict: see `finite.StepCheck.verdict`. If only the device knows, it is told to take back what
                must not count.
        """
        for residuals in self._all():
            if isinstance(verdict, Tensor):
                residuals.select(verdict)
                residuals.commit()
            elif verdict:
                residuals.commit()
            else:
                residuals.discard()

    def carry(self) -> None:
        """See `Residuals.carry`."""
        for residuals in self._all():
            residuals.carry()

    def revert(self, names: Iterable[str] | None = None) -> None:
        """Bring back what was there before the last step: its gradients were not applied.

        Args:
            names: parameters; None means all.
        """
        names = None if names is None else list(names)
        for residuals in self._all():
            residuals.revert(names)

    def revert_unused(self, unused: Mapping[str, bool | Tensor]) -> None:
        """As `revert`, of the parameters for which unused is true, or a tensor that only the device knows."""
        self.revert(name for name, known in unused.items() if known is True)
        for name, known in unused.items():
            if isinstance(known, Tensor):
                for residuals in self._all():
                    residuals.revert_where(name, known)

    def freeze(self) -> None:
        """Keep what is valid, to be read, and give back the memory that a step would write."""
        for residuals in self._all():
            residuals.freeze()

    def to(self, device: torch.device) -> None:
        """Make residuals on a device from now on."""
        for residuals in self._all():
            residuals.device = device

    def _all(self) -> list[Residuals]:
        return [value for value in vars(self).values() if isinstance(value, Residuals)]
