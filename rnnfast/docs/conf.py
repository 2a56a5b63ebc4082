"""Configuration of Sphinx for `make docs`. The sources are the Markdown files of the repository.

The root of the repository is Sphinx's source folder, so that links between documents are the same
here and in an editor. `PAGES` is the navigation.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

PAGES = {
    "Guides": [
        "rnnfast/docs/layers",
        "rnnfast/docs/cells",
        "rnnfast/docs/accelerate",
        "rnnfast/docs/frozen",
        "rnnfast/docs/c-library",
        "rnnfast/docs/serving",
        "rnnfast/docs/compile-export",
        "rnnfast/docs/backends",
        "rnnfast/docs/support",
        "rnnfast/models/README",
        "rnnfast/text/README",
        "rnnfast/explain/README",
        "rnnfast/cli/README",
    ],
    "Interface": [
        "rnnfast/docs/api/rnnfast",
        "rnnfast/docs/api/functional",
        "rnnfast/docs/api/models",
        "rnnfast/docs/api/text",
        "rnnfast/docs/api/explain",
        "rnnfast/docs/api/onnx",
        "rnnfast/docs/api/cli",
    ],
    "Project": [
        "benchmarks/README",
        "rnnfast/README",
        "csrc/README",
        "csrc/EXPERIMENTS",
        "CONTRIBUTING",
        "CHANGELOG",
    ],
}
"""The documents below the home page, README, by the heading that they stand under."""

COMMANDS = [
    *("train", "generate", "translate"),
    *("explain lstm", "explain gradients", "explain gates"),
    *("bench", "doctor"),
]
"""The commands of `rnnfast` whose help is shown."""

project = "rnnfast"
author = "the authors of rnnfast"
html_title = "rnnfast"
root_doc = "README"
source_suffix = {".md": "markdown"}
include_patterns = ["*.md", "csrc/*.md", "benchmarks/*.md", "rnnfast/*.md", "rnnfast/**/*.md"]
exclude_patterns = [".*", "build", "dist"]  # of the folders that are searched
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "formulas",
]

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False

myst_heading_anchors = 3
myst_links_external_new_tab = False
myst_enable_extensions = ["colon_fence"]

# `name` in a docstring is a Python object. A name of rnnfast must be one that the site describes;
# others, such as arguments and names of torch, are set as code where there is nothing to link to.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [(r"py:obj", r"(?!rnnfast\.).*"), (r"py:(?!obj).*", r".*")]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Inputs", "params_style"),
    ("Outputs", "params_style"),
    ("Weights", "params_style"),
]


def add_navigation(app: Any, document: str, source: list[str]) -> None:
    """Appends the tables of contents to the home page, whose source has none."""
    if document != root_doc:
        return
    for caption, pages in PAGES.items():
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        source[0] += "".join(f"/{page}\n" for page in pages) + "```\n"


def add_help(app: Any, document: str, source: list[str]) -> None:
    """Appends what each command prints with --help to the page on the command line."""
    if document != "rnnfast/docs/api/cli":
        return
    from rnnfast.cli.parsers import build_parser

    os.environ["COLUMNS"] = "88"  # the width of the text
    for command in COMMANDS:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            build_parser().parse_args([*command.split(), "--help"])
        source[0] += f"\n## rnnfast {command}\n\n```text\n{printed.getvalue()}```\n"


def write_index(app: Any, exception: Exception | None) -> None:
    """Puts the home page where web servers and readers look for it."""
    if exception is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app: Any) -> None:
    """Registers the functions above."""
    app.connect("source-read", add_navigation)
    app.connect("source-read", add_help)
    app.connect("build-finished", write_index)
