"""Where the outermost backward begins and ends, for which torch has no public interface.

A backward may run others inside: reentrant activation checkpointing runs one for every block. FSDP calls its
hooks in whichever it is, and several roots of a model have callbacks of their own at its end. A training step
is the outermost one, whole. torch's engine knows no depth, but it says what node is being evaluated: where a
backward ends inside another's node, it is a nested one, and its end is passed on to the one around it.

Checked on torch 2.9, 2.13 and 2.14, on the CPU; not run on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradq.errors import UnsupportedError

__all__ = ["OutermostBackward", "backward_id"]


def backward_id() -> int:
    """A number of the innermost backward under way, -1 outside."""
    if not hasattr(torch._C, "_current_graph_task_id"):
        raise UnsupportedError(
            f"FSDP2 with gradq needs torch._C._current_graph_task_id, which torch {torch.__version__} lacks"
        )
    return torch._C._current_graph_task_id()


class OutermostBackward:
    """Calls begin and end around each outermost backward in which `enter` is called.

    A backward that raises never ends; the next one begins all the same, after `abandon`.

    Args:
        begin: a function that is called by the first `enter` of an outermost backward.
        end: a function that is called when that backward is over, after all other callbacks at its end.
        abandon: a function that is called in the place of end if that backward raised, by the first
            `enter` afterwards.
    """

    def __init__(
        self, begin: Callable[[], None], end: Callable[[], None], abandon: Callable[[], None]
    ) -> None:
        self._begin, self._end, self._abandon = begin, end, abandon
        self._is_open = False
        self._entries = 0
        # The engine and the graph hold the marks; those of a backward that raised go with it.
        self._marks: weakref.WeakSet[_End | _Bridge] = weakref.WeakSet()

    def enter(self) -> None:
        """Note that something happens in the backward under way.

        Raises:
            UnsupportedError: no backward is under way.
        """
        task = backward_id()
        if task == -1:
            raise UnsupportedError(
                "FSDP reduces gradients outside of a backward, as pipeline schedules do; gradq counts steps "
                "by backwards: train without a pipeline, or without gradq.compress"
            )
        if self._is_open and not self._marks:
            self._is_open = False
            self._abandon()
        if not self._is_open:
            self._is_open = True
            self._begin()
        self._entries += 1
        if all(mark.task != task for mark in self._marks):
            self.watch(task)

    def watch(self, task: int | None, entries: int = -1) -> None:
        """Have the engine call `reached` at the end of the backward under way."""
        mark = _End(self, task, entries)
        self._marks.add(mark)
        torch.autograd.Variable._execution_engine.queue_callback(mark)

    def reached(self, mark: _End) -> None:
        """Note that a backward is over: the outermost, or one inside another's node."""
        self._marks.discard(mark)
        if mark.entries != self._entries:  # FSDP's own callbacks may come after this one: ask again behind
            self.watch(mark.task, self._entries)
            return
        node = torch._C._current_autograd_node()
        if node is not None and self._marks:
            return  # a backward around this one is watched already
        following = [] if node is None else [after for after, _ in node.next_functions if after is not None]
        if following:  # callbacks can be queued from inside the backward around only: when it goes on
            bridge = _Bridge(self)
            self._marks.add(bridge)
            bridge.handles = [after.register_prehook(bridge) for after in following]
            return
        self._is_open = False
        self._marks.clear()
        self._end()

    def crossed(self, bridge: _Bridge) -> None:
        """Note that the backward around a nested one goes on."""
        if bridge in self._marks:
            self._marks.discard(bridge)
            for handle in bridge.handles:
                handle.remove()
            self.watch(backward_id())


class _End:
    """A callback at the end of a backward.

    Attributes:
        task: the backward whose end it waits for, by `backward_id`; None for the one around that.
        entries: the number of calls of `enter` when it was queued, -1 if that does not matter.
    """

    def __init__(self, owner: OutermostBackward, task: int | None, entries: int) -> None:
        self._owner, self.task, self.entries = owner, task, entries

    def __call__(self) -> None:
        self._owner.reached(self)


class _Bridge:
    """A hook before a node that the outer backward evaluates after the nested one.

    Attributes:
        task: None, for it waits for the end of no backward.
        handles: the handles that remove it.
    """

    task = None

    def __init__(self, owner: OutermostBackward) -> None:
        self._owner = owner
        self.handles: list[Any] = []

    def __call__(self, gradients: tuple[Tensor, ...]) -> None:
        self._owner.crossed(self)
