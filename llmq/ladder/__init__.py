"""The quality ladder: ways to make a model smaller, from cheap to dear and from large to small, all
measured on the same text."""
