"""The leaderboard as one HTML file that needs no network.

`render` reads a results folder, computes what `offrl leaderboard` computes, and fills
`page.html.jinja`; the style sheet and the script go into the file.  Every table and
chart is drawn without the script, which sorts, filters and opens cells.  `server` shows
the page of a folder that a benchmark is filling.
"""

from offrl_jax.page.drawing import render
from offrl_jax.page.serving import server

__all__ = ["render", "server"]
