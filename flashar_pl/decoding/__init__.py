"""Decoding of any model under any plan."""

from flashar_pl.decoding.engine import RUNNERS, Engine, Runner, generate

__all__ = ["RUNNERS", "Engine", "Runner", "generate"]
