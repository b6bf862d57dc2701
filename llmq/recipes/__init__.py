"""Recipe files: how they are read, and ready ones. README.md lists the keys."""
