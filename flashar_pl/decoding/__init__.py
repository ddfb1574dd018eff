"""Decoding of any model under any plan."""

from flashar_pl.decoding.engine import Engine, generate
