"""Whether somebody watches."""

import os


def headless() -> bool:
    """Whether nobody watches: only a kernel that Jupyter's server started shows progress bars."""
    return "JPY_SESSION_NAME" not in os.environ
