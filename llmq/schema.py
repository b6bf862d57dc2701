"""The version of the JSON that llmq gives: reports, and what commands print, errors too. It goes up
when a key is gone or means something else; new keys come without notice."""

SCHEMA_KEY = "schema_version"
SCHEMA_VERSION = 1
