"""The on-disk formats: see README.md here for who reads what."""
