"""What long work tells its caller while it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class Reporter:
    """Progress, as nothing.  The command line passes one that prints and shows bars."""

    def plan(self, name: str, lines: Sequence[str]) -> None:
        """Called once, before anything is computed: the method's name, and the plan in words, line by line."""

    def stage(self, name: str) -> None:
        """A stage begins: ``mask``, ``bank``, ``training``, ``evaluation``, ``attack``."""

    def edited(self, facts: Mapping[str, float]) -> None:
        """An edit in closed form is computed; numbers of it by name, such as its condition number."""

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
