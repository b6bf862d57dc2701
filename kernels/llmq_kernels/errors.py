"""What callers may want to tell apart from defects."""


class SettingError(ValueError):
    """An environment variable of the user's (`LLMQ_BACKEND`, `LLMQ_COMPUTE`) asks for what does not
    exist or cannot be done. The message names it and what to do."""
