"""What stays of a run that ended early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmq.errors import LlmqError, LostProcessError
from llmq.storage import files
from llmq.storage.stamps import SourceChangedError
from llmq.storage.workspace import Workspace


@contextmanager
def kept_for_later(work: Workspace, is_same: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What was finished stays for the next attempt, unless the job itself is at fault. is_same:
    whether the source still holds what was read of it, though its files were touched."""
    try:
        yield
    except (files.DamagedError, LostProcessError):
        work.close()
        raise
    except SourceChangedError as error:
        (work.close if error.may_be_same and is_same() else work.discard)()
        raise
    except (files.WriteError, OSError) as error:  # OSError: of activations, reports or the manifest
        work.close()
        known = (
            error
            if isinstance(error, files.WriteError)
            else files.unwritable(error.filename or work.work_dir, error.strerror or error)
        )
        raise files.WriteError(f"{known}, which continues where it stopped") from None
    except LlmqError:
        work.discard()
        raise
    except BaseException:
        work.close()
        raise
