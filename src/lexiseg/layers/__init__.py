"""Building blocks that two or more methods share, and refinements of masks."""
