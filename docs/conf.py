"""Sphinx, as `make docs` calls it: `sphinx-build -c docs . build/docs`.

The source folder is the checkout's root, so that the READMEs of recipes and
benchmarks are pages as they stand, and a link means the same to GitHub, to an
editor and to the site.
"""

import importlib
import inspect

from sphinx.util.docutils import SphinxDirective

import speechbrain_taskarith

project = "speechbrain_taskarith"
author = "The speechbrain_taskarith contributors"
project_copyright = f"{author}, Apache-2.0"
version = release = speechbrain_taskarith.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "recipes/**/README.md",
    "benchmarks/README.md",
    "examples/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [
    *(".*", "build", "dist", "**/results", "**/__pycache__"),
    "docs/_root",
    "docs/_static",
]

# Markdown
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Notebooks are shown with the outputs that they hold.
nb_execution_mode = "off"

# Docstrings: SpeechBrain's form is NumPy's, and `name` is a link where it is
# a name of ours.
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # `best` is the name of two attributes
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
add_module_names = False
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 72
# Pages
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


class Api(SphinxDirective):
    """`{api} module` over a list of names: a table of them, then each."""

    required_arguments = 1
    has_content = True

    def run(self):
        """Return what autosummary and autodoc make of the names."""
        (module,) = self.arguments
        names = " ".join(self.content).split()
        lines = [f".. currentmodule:: {module}", ".. autosummary::"]
        lines.append("   :nosignatures:")
        lines += ["", *(f"   {name}" for name in names), ""]
        for name in names:
            found = getattr(importlib.import_module(module), name)
            if inspect.isclass(found):
                lines += [f".. autoclass:: {name}", "   :members:"]
                if found.__bases__ != (object,):
                    lines.append("   :show-inheritance:")
            else:
                lines.append(f".. autofunction:: {name}")
            lines.append("")
        text = "\n".join(["```{eval-rst}", *lines, "```"])
        return self.parse_text_to_nodes(text)


SENTENCES = {}


def keep_sentence(app, what, name, obj, options, lines):
    """Note what a property says, before napoleon reads "type: text" there."""
    if what in ("attribute", "property"):
        SENTENCES[name] = list(lines)


def put_sentence_back(app, what, name, obj, options, lines):
    """Put back what a property says."""
    if name in SENTENCES:
        lines[:] = SENTENCES.pop(name)


def setup(app):
    """Make `{api}` known, and frame napoleon."""
    app.add_directive("api", Api)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)
    app.connect("autodoc-process-docstring", put_sentence_back, priority=600)
    return {"parallel_read_safe": True}
