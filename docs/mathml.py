"""A Sphinx extension: formulas as MathML, which browsers draw by themselves, without scripts or fonts to load."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

BAR = "<mo>&#x02016;</mo>"  # of a norm; raised to a power it would shrink beside its own left one


def mathml(latex: str, display: str) -> str:
    """A formula. Raises SphinxError when it has a command that is not known."""
    made = convert(latex, display=display)
    if "\\" in made:
        raise SphinxError(f"no MathML for {latex!r}: {made}")
    return made.replace(BAR, f'<mo stretchy="false">{BAR[4:]}')


def visit_math(self, node: nodes.math) -> None:
    """Within a line."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_displaymath(self, node: nodes.math_block) -> None:
    """On lines of its own, which may be wider than a phone."""
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
