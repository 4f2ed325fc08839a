"""Schedules: after which inner steps the fragments of a model are averaged."""

from __future__ import annotations

from dataclasses import dataclass

from gradq.errors import ConfigError

__all__ = ["Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When fragments are averaged, in inner steps.

    Attributes:
        every: steps between two averages of a parameter.
        fragments: the number of parts of the model, averaged one after another.
        delay: steps that an average may take.
        alpha: the share of a rank's own parameters that stays when an average is applied; None adds what was
            learned meanwhile.

    Raises:
        ConfigError: they do not fit together.
    """

    every: int
    fragments: int
    delay: int
    alpha: float | None

    def __post_init__(self) -> None:
        for name in ("every", "fragments", "delay"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r:.200}: it must be a number of inner steps, an integer"
                )
        if self.every < 1:
            raise ConfigError(f"every={self.every}: ranks average after 1 inner step or more")
        if not 1 <= self.fragments <= self.every:
            raise ConfigError(
                f"fragments={self.fragments}: choose from 1 to every={self.every}, at most one in a step"
            )
        if not 0 <= self.delay <= self.every // self.fragments:
            raise ConfigError(
                f"delay={self.delay}: choose from 0 to every // fragments = {self.every // self.fragments}, "
                "so that one average is applied before the next one starts"
            )
        if self.alpha is not None and not (self.delay and 0 <= self.alpha <= 1):
            raise ConfigError(
                f"fragment_update_alpha={self.alpha}: choose from 0 to 1, together with a delay of 1 or "
                "more: without one there are no steps of the rank's own to mix in"
            )

    def __str__(self) -> str:
        mixing = "" if self.alpha is None else f", alpha={self.alpha}"
        return f"every={self.every}, fragments={self.fragments}, delay={self.delay}{mixing}"
