"""Configures the site: `sphinx-build -W -b html docs docs/_build`.

Pages are Markdown (MyST). The reference is made from the docstrings and its table of
distances from `kddm_jax.DISTANCES`, so that both agree with the code.
"""

import os
import re
from pathlib import Path

import docutils.nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.errors import ExtensionError

import kddm_jax
from kddm_jax import DISTANCES

project = "kddm_jax"
author = "the authors of kddm_jax"
version = release = kddm_jax.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"kddm_jax {version}"
html_show_copyright = False

# `name` in a docstring is a link if there is such a name, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_typehints = "signature"
napoleon_use_ivar = True  # attributes are those that the docstring lists
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3


class Catalogue(Directive):
    """Renders the table of `kddm_jax.DISTANCES`."""

    HEAD = ("key", "distance", "function", "takes", "promises", "cost", "λ")

    @staticmethod
    def cells(key, row):
        """Makes a row of the table in reStructuredText."""
        options = ", ".join(f"{name}={value!r}" for name, value in row.options)
        function = f":py:func:`~kddm_jax.{row.fn.__name__}`"
        promises = sorted(row.promises) + (["per sample"] if row.per_sample else [])
        return (
            f"``{key}``",
            row.title,
            f"{function} ``{options}``" if options else function,
            ", ".join(row.inputs),
            ", ".join(promises) or "–",
            row.complexity,
            f"{next(iter(row.weights.values())):g}",
        )

    def run(self):
        """Renders the table."""
        table = [self.HEAD, *(self.cells(*item) for item in DISTANCES.items())]
        lines = [".. list-table::", "   :header-rows: 1", ""]
        for cells in table:
            marks = ("   * - ", *["     - "] * (len(cells) - 1))
            lines += [f"{mark}{cell}" for mark, cell in zip(marks, cells, strict=True)]
        node = docutils.nodes.Element()
        self.state.nested_parse(StringList(lines, "DISTANCES"), 0, node)
        return node.children


def mark_labels(app, what, name, obj, options, lines):
    """Makes the labels Cost, Gradient and Not for bold."""
    label = re.compile(r"(?:^|(?<=  ))(Cost|Gradient|Not for):(?= )")
    lines[:] = [label.sub(r"**\1:**", line) for line in lines]


def check_complete(app, env):
    """Stops the build if a public name has no entry."""
    documented = env.get_domain("py").objects
    missing = [
        name
        for name in kddm_jax.__all__
        if callable(getattr(kddm_jax, name)) and f"kddm_jax.{name}" not in documented
    ]
    if missing:
        raise ExtensionError(f"no page of docs/api has {', '.join(missing)}")


def skip_fields(app, what, name, obj, skip, options):
    """Skips fields of named tuples ("Alias for field number 0")."""
    return True if type(obj).__name__ == "_tuplegetter" else None


# Pages link to files of the repository; these files are also pages of the site.
ROOT = Path(__file__).parents[1]
SHOWN = {
    ROOT / "README.md": "index.md",
    ROOT / "benchmarks" / "README.md": "benchmarks.md",
    ROOT / "experiments" / "README.md": "experiments.md",
}


def redirect(app, docname, source):
    """Redirects links that leave docs/ to the pages that include their targets."""
    folder = Path(app.srcdir, docname).parent

    def target(match):
        path = Path(os.path.normpath(folder / match[1]))
        return f"](/{SHOWN[path]}" if path in SHOWN else match[0]

    source[0] = re.sub(r"\]\(\s*([\w./-]+\.md)", target, source[0])


def setup(app):
    """Registers the extensions of this file."""
    app.add_directive("catalogue", Catalogue)
    app.connect("source-read", redirect)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", mark_labels)
    app.connect("env-check-consistency", check_complete)
