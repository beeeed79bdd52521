"""The base's hidden states on disk: computed once for each example, read in place of running the base's blocks."""
