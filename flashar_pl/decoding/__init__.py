"""Decoding of any model under any plan."""

from flashar_pl.decoding.loop import generate

__all__ = ["generate"]
