"""Notebook widgets, one a file. They hold no mathematics: each shows what the package computes, as controls move.

Every widget is a box of ipywidgets controls, which are its public attributes: `explorer.rank.value = 32` does what the
slider does. All can be used with the keyboard alone. `check` says whether an answer to an exercise is right.
"""

from eora_lab.widgets.ablation import AblationForm
from eora_lab.widgets.budget import BudgetExplorer
from eora_lab.widgets.exercises import check
from eora_lab.widgets.generator import SideBySide
from eora_lab.widgets.runs import RunBrowser
from eora_lab.widgets.spectrum import SpectrumExplorer

__all__ = ["AblationForm", "BudgetExplorer", "RunBrowser", "SideBySide", "SpectrumExplorer", "check"]
