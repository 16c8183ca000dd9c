"""A small world of drawn pictures whose truth is known, and the verdict of the filter against it."""
