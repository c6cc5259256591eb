"""Running the notebooks and keeping the repository in step."""

import sys

# nbformat imports jsonschema, and that, to judge internationalised addresses, a parser which takes 1.3 CPU seconds to
# build. It does without one that is not installed, and no notebook's format asks for it.
sys.modules.setdefault("rfc3987_syntax", None)
