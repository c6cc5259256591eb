"""What the hub refuses, in words: no network, no token, no licence, no such name, no room."""

import errno

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

TOKEN = "log in with `hf auth login` or set HF_TOKEN"


def why_not(page: str, error: BaseException) -> str:
    """Why something was not to be had, and what to do about it; `page`: its address below huggingface.co."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for one in causes:
        status = one.response.status_code if isinstance(one, HfHubHTTPError) else None
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full: make room and run again, what is here already is not fetched again"
        if isinstance(one, GatedRepoError) or "gated dataset" in str(one):  # as datasets says it
            who = "its licence asks who you are" if status == 401 else "this token's owner has not accepted its licence"
            return f"{who}: accept it on huggingface.co/{page}, then {TOKEN}"
        if isinstance(one, RepositoryNotFoundError):
            return f"there is no huggingface.co/{page}, or it is private: check the name, or {TOKEN}"
        if status == 401:
            return f"the hub does not know this token: {TOKEN}"
    if {type(one).__name__ for one in causes} & {"DatasetNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
        return f"the hub has no {page}, or not in this revision: check both, names there are owner/name"
    return (
        f"no connection ({type(error).__name__}): run again when there is one, what is here already is not fetched "
        "again; without a network the preset 'tiny' runs"
    )
