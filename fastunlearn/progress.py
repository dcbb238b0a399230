"""What long work tells its caller while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

#: Told how many of how many equal parts are done.
OnProgress = Callable[[int, int], None]


def untold(done: int, total: int) -> None:
    """Progress that nobody asked for."""


class Reporter:
    """Progress, as nothing.  The command line passes one that prints and shows bars."""

    def plan(self, name: str, lines: Sequence[str]) -> None:
        """Called once, before anything is computed: the method's name, and the plan in words, line by line."""

    def stage(self, name: str) -> None:
        """A stage begins.

        They are ``loading``, ``mask``, ``search``, ``bank``, ``edit``, ``training``, ``evaluation`` and ``attack``.
        """

    def edited(self, facts: Mapping[str, float]) -> None:
        """An edit in closed form is computed; numbers of it by name, such as its condition number."""

    def working(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` equal parts of a ``stage`` are done: ``mask``, ``search``, ``bank``."""

    def training(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step was logged."""

    def scoring(self, done: int, total: int) -> None:
        """``done`` of ``total`` images are made."""

    def attacking(self, done: int, total: int) -> None:
        """``done`` of at most ``total`` denoiser forwards are spent."""

    def comparing(self, done: int, total: int) -> None:
        """``done`` of ``total`` pairs of image files are compared."""

    def note(self, text: str) -> None:
        """Something happened that is no mistake but should be known."""
