"""The commands of ``python -m freegpt_auth``: one module per family, each with its own arguments."""

from . import fleet, tokens

FAMILIES = (tokens, fleet)
"""Each has a function ``add_arguments(group)`` that adds its commands; ``--help`` lists the families in this order."""
