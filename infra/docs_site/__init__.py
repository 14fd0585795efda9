"""Generators of the documentation: pages that are generated from the code and from recorded results, and the site.

recipe.py      docs/reference/recipe.md from the sections of the config
commands.py    docs/reference/commands.md from the command line's own help
errors.py      docs/reference/errors.md from the messages that the code raises
results.py     the tables of docs/results from tests/bench/results
generate.py    writes all of them: `python infra/docs_site/generate.py`
hooks.py       the site: links to files outside docs/ become pages
mkdocs.yml     the site's settings, for `bash infra/docs`
"""
