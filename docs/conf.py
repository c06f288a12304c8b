"Sphinx's configuration of the site that `make docs` builds from the notebooks (see build.py)."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))      # for `anchors`

project = 'mt_editflow_nb'
author = 'The mt_editflow_nb authors'
copyright = '2026 onwards, the mt_editflow_nb authors'

extensions = ['myst_nb']
source_suffix = {'.md': 'myst-nb', '.ipynb': 'myst-nb'}
exclude_patterns = ['**/.ipynb_checkpoints']
nitpicky = True

html_theme = 'sphinx_book_theme'
html_title = 'mt_editflow_nb'
html_theme_options = {'show_navbar_depth': 1, 'show_toc_level': 2}

nb_execution_mode = 'off'       # the outputs that are committed are the ones that are shown
nb_merge_streams = True
myst_enable_extensions = ['amsmath', 'colon_fence', 'dollarmath', 'html_image']
myst_heading_anchors = 4
myst_heading_slug_func = 'anchors.as_in_jupyter'
myst_url_schemes = ['http', 'https', 'mailto']
