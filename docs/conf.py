"""How Sphinx builds these pages; `./run docs` does it with every warning an error."""

project = "ReLU-Falcon"
html_title = "ReLU-Falcon"
html_theme = "furo"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
default_role = "code"
exclude_patterns = ["_build", "figures", "images"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nb_execution_mode = "off"  # tests/docs executes what is shown
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
