"""Sphinx: python -m sphinx -W docs docs/_build (pip install '.[docs]')."""

from importlib.metadata import version as installed_version

project = "uvsock"
author = "The uvsock authors"
version = release = installed_version("uvsock")

extensions = ["myst_parser"]
# The anchors that GitHub gives to headings, so that links between pages work in both places.
myst_heading_anchors = 3
exclude_patterns = ["_build"]
# What is not Python is highlighted or left alone; a block of one language is never guessed at.
highlight_language = "none"

html_theme = "furo"
html_title = f"uvsock {release}"
