"""Running the notebooks and keeping the repository in step."""
