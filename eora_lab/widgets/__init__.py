"""Notebook widgets, one a file. They hold no mathematics: each shows what the package computes, as controls move.

Their controls are their public attributes: `explorer.rank = 32` and `form.dense.value = False` do what a slider and a
checkbox do; the board is a page of its own. All can be used with the keyboard alone. `check` says whether an answer to
an exercise is right.
"""

from eora_lab.widgets.ablation import AblationForm
from eora_lab.widgets.board import Board
from eora_lab.widgets.budget import BudgetExplorer
from eora_lab.widgets.exercises import check
from eora_lab.widgets.generator import SideBySide
from eora_lab.widgets.rank_explorer import RankExplorer

__all__ = ["AblationForm", "Board", "BudgetExplorer", "RankExplorer", "SideBySide", "check"]
