"""Whether somebody watches."""

import os
import sys


def headless() -> bool:
    """Whether nobody watches: only a kernel that Jupyter's server started shows progress bars."""
    return "JPY_SESSION_NAME" not in os.environ


def compared() -> bool:
    """Whether what is printed lands in a stored output: in a kernel that nobody watches (papermill, nbval)."""
    return "ipykernel" in sys.modules and headless()
