"""Sphinx configuration: sphinx-build -W docs docs/_build"""

project = "ws_algorithm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_typehints = "signature"
html_theme = "furo"
exclude_patterns = ["_build"]
