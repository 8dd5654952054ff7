"""A Sphinx extension: `{explorable}` is the page's interactive part, from what `python -m docs.explored` wrote down."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from docs.explored import FILE, METHODS, PROMPTS
from eora_lab.files import read_json
from eora_lab.plots.explorable import as_page, colours, drawn

RANK = 32  # where the slider stands first


def state() -> dict:
    """What the front-end shows."""
    found = read_json(FILE)
    first = {"layer": next(iter(found["views"])), "prompt": PROMPTS[0], "rank": RANK}
    return found | first | {"methods": drawn(METHODS), "colours": colours()}


def told(found: dict) -> str:
    """How the numbers were made, in words."""
    made, settings = found["made"], found["settings"]
    return (
        f"Made by `{made['command']}` in {made['seconds'] / 60:.0f} minutes ({made['machine']['processor']}, torch "
        f"{made['versions']['torch']}): {settings['model']}, compressed by {settings['base']}, statistics of "
        f"{settings['calibration_tokens']} tokens of {settings['calibration']}; texts are greedy, "
        f"{settings['new_tokens']} tokens; perplexity is that of {settings['perplexity_tokens']} other tokens "
        f"({settings['perplexity']}), few, but the same ones everywhere."
    )


class Explorable(SphinxDirective):
    """Takes nothing."""

    def run(self) -> list[nodes.Node]:
        """The explorable, and how its numbers were made."""
        found = state()
        return [nodes.raw("", as_page(found), format="html"), *self.parse_text_to_nodes(told(found))]


def setup(app: Sphinx) -> dict:
    """What Sphinx calls."""
    app.add_directive("explorable", Explorable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
