"""Notebook widgets, one a file. They hold no mathematics: each shows what the package computes, as controls move.

A widget is a box of ipywidgets controls, which are its public attributes: `explorer.rank.value = 32` does what the
slider does; the board is a page of its own. All can be used with the keyboard alone.
"""

from eora_lab.widgets.ablation import AblationForm
from eora_lab.widgets.board import Board
from eora_lab.widgets.budget import BudgetExplorer
from eora_lab.widgets.generator import SideBySide
from eora_lab.widgets.spectrum import SpectrumExplorer

__all__ = ["AblationForm", "Board", "BudgetExplorer", "SideBySide", "SpectrumExplorer"]
