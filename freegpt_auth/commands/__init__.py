"""The commands of ``python -m freegpt_auth``: one module per family, each with its own arguments."""
