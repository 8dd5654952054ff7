"""The board of a result store: a live table with charts, in a notebook, from a server of this machine, or in a file."""

from eora_lab.board.data import board, describe
from eora_lab.board.page import NAME, page, write_page
from eora_lab.board.report import duration

__all__ = ["NAME", "board", "describe", "duration", "page", "write_page"]
