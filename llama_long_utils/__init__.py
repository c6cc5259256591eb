"""Helpers shared by the notebooks on long-context Llama; see README.md for where each step lives."""

import logging

# On import, bitsandbytes warns that an optional CPU kernel is missing from the hub; nothing here uses it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
