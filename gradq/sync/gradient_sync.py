"""GradientSync: the main path. A bucket of gradients goes in, their mean over ranks comes out.

The life of a gradient:

1. A hook says `begin_step` and hands over its buckets one by one (`average`); the parameters of each are
   looked up once per layout (`_layout_of`).
2. The plan has said which codec each parameter travels in; small ones travel exact in the same messages.
3. The bucket is cut into chunks (`sync/layout.py`). For each the collective encodes, exchanges, averages and
   decodes, stage by stage on the executor's threads (`_stages`; read `collectives/direct.py`, then
   `two_phase.py`).
4. At `end_step` the residuals are committed, unless a gradient was not finite or an outlier (`commit_step`);
   what the trainer does not apply after all is taken back (`not_applied`, `discard_step`).

A trainer's step::

    sync.begin_step()
    futures = [sync.average(flat, names, index=index) for index, (flat, names) in enumerate(buckets)]
    futures[-1] = sync.end_step(futures[-1])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor
from torch.futures import Future

from gradq import wire
from gradq.collectives import Step, dense
from gradq.metrics import Event
from gradq.sync.base import Sync
from gradq.sync.layout import BucketLayout, Chunk
from gradq.transport.contract import Pending
from gradq.transport.streams import done

__all__ = ["GradientSync"]


class GradientSync(Sync):
    """Averages gradients over the ranks of a group, bucket by bucket; see `Sync` for its arguments.

    For the spec "none", and when it is closed, a bucket is averaged by a plain all-reduce.
    """

    def average_buckets(
        self, buckets: Iterable[tuple[Tensor, Sequence[str]]], first_index: int = 0
    ) -> list[Future[Tensor]]:
        """A whole step: average some buckets.

        Args:
            buckets: at least one, as `average` takes them; each is averaged as soon as it is there.
            first_index: index of the first one; the others follow.

        Returns:
            A future of each; the step has ended with the last one.
        """
        with self._telling():
            self.begin_step()
            futures = [
                self.average(flat, names, index=index)
                for index, (flat, names) in enumerate(buckets, first_index)
            ]
            return [*futures[:-1], self.end_step(futures[-1])]

    def begin_step(self) -> None:
        """Start a step. A policy that learns may plan again here: all ranks call it at the same place."""
        with self._telling():
            super().begin_step()
            if self.world_size > 1 and self.learner.is_due(self.step):
                self.learner.learn()
                self.set_policy(self.learner.policy, self.learner.label, verb="plan again")

    def average(self, flat: Tensor, names: Sequence[str], *, index: int) -> Future[Tensor]:
        """Average one bucket of the step under way.

        Args:
            flat: the gradients of the named parameters, one after another; replaced by their mean.
            names: names of the parameters, in order.
            index: index of the bucket.

        Returns:
            A future of flat.
        """
        with self._telling():
            if self.world_size == 1:  # the mean is the gradient
                return done(flat)
            dense_bytes = wire.ring_bytes(dense.nbytes(flat), self.world_size)
            self.metrics.record(Event("dense_bytes", dense_bytes, self.step, index))
            if self.is_plain:  # what DDP does without a hook, counted
                self.metrics.record(Event("wire_bytes", dense_bytes, self.step, index))
                return dense.all_reduce(flat, self.group)
            layout, step = self._layout_of(flat, tuple(names), index), self.step_of(index)
            if self.learner.adaptive is not None:
                self.executor.submit(self._measure(layout, flat, step), flat)
            futures = [self.executor.submit(self._stages(chunk, flat, step), flat) for chunk in layout.chunks]
            return futures[-1]  # the others are done before it

    def end_step(self, last: Future[Tensor]) -> Future[Tensor]:
        """End the step under way: `commit_step`, as soon as all its buckets are averaged.

        Args:
            last: what `average` returned for the step's last bucket.

        Returns:
            A future of the same bucket, done when the step has ended.
        """
        if self.world_size == 1 or self.is_plain:
            self.commit_step()
            return last
        return self.executor.after(last, self.commit_step)

    def wait(self, future: Future[Tensor]) -> None:
        """Wait for an average on this thread; what stopped the averaging is raised as it is.

        A future keeps an error's text only; DDP, which waits by itself, shows that.
        """
        try:
            future.wait()
        except RuntimeError:
            if self.failure is not None:
                raise self.failure from None
            raise

    def drop_layouts(self) -> None:
        """See `Sync`."""
        self._layouts: dict[int, BucketLayout] = {}

    def _layout_of(self, flat: Tensor, names: tuple[str, ...], index: int) -> BucketLayout:
        """The bucket's collectives and buffers, made anew when DDP has changed its layout."""
        layout = self._layouts.get(index)
        if layout is None or not layout.fits(flat, names):
            # a stream runs one stage after another, whatever their size
            numel = self.config.chunk_numel * self.world_size if flat.is_cpu else max(flat.numel(), 1)
            transfers, setting = self.resolved.transfers(names), self.setting(flat.device)
            layout = BucketLayout(flat, names, transfers, self.resolved.used, setting, numel)
            self._layouts[index] = layout
        return layout

    def _measure(self, layout: BucketLayout, flat: Tensor, step: Step) -> Iterator[Pending]:
        """The learner's look at a bucket before it is averaged, for the executor."""
        self.learner.measure([self.parameters[name] for name in layout.names], flat, step)
        yield from ()

    def _stages(self, chunk: Chunk, flat: Tensor, step: Step) -> Iterator[Pending]:
        """The stages of one chunk, for the executor."""
        yield from chunk.average(flat, step)
        if self.has_feedback:
            self.check.add(chunk.mean(flat), flat.dtype)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What is raised inside ends the averaging: the other ranks must not wait for this one."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise
