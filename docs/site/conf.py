"""How Sphinx writes the site of `python -m docs.build`."""

import eora_lab

project, author, copyright = "EoRA Lab", "the EoRA Lab authors", "the EoRA Lab authors, Apache-2.0"
version = release = eora_lab.__version__
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "docs.docstrings", "docs.explorable", "docs.mathml"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are those recorded
nb_ipywidgets_js: dict = {}  # it would come from the network
nb_merge_streams = True
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
WIDE = ("paper", "slides")  # what is there needs the room
html_sidebars = {name: [] for name in ("index", "docs/guides/results", *WIDE)}  # nothing stands below the first two
html_theme = "pydata_sphinx_theme"
html_title = "EoRA Lab"
html_static_path = ["_static"]
html_css_files = ["lab.css"]
html_math_renderer = "mathml"
html_domain_indices = False
html_show_sourcelink = html_copy_source = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 6,
    "show_prev_next": True,
    "secondary_sidebar_items": {"**": ["page-toc"], **{name: [] for name in WIDE}},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
}
