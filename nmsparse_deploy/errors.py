"""Expected failures: one sentence, and the next command to type.

Anything that is raised on purpose derives from `NmsparseError`; the command line prints its
sentence and its hint and exits with its code. A traceback means a bug (or `NMSPARSE_DEBUG=1`).
"""

from __future__ import annotations

import errno


class NmsparseError(Exception):
    """A failure that the user can act on (exit code 1)."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(NmsparseError):
    """A command, recipe or argument that is wrong (exit code 2)."""

    exit_code = 2


class CheckFailed(NmsparseError):
    """A verification that found what must not be there (exit code 1)."""


class MissingExtra(NmsparseError):
    """An optional dependency that is not installed (exit code 1)."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(
            f"{what} needs the package '{package}', which is not installed.",
            f"pip install 'nmsparse-deploy[{extra}]'",
        )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, in 200 characters and without a full
    stop."""
    text = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
    return text.rstrip(".")[:200]


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def from_os_error(error: OSError) -> NmsparseError:
    """Turn a failed file operation into one sentence that names the file."""
    where = f" '{error.filename}'" if error.filename else ""
    if error.errno in _DISK_FULL:
        return NmsparseError(
            f"The disk is full: could not write{where}; nothing half-written was kept.",
            "free some space, or choose another folder with --out, and run the same command again",
        )
    if error.errno in _NOT_WRITABLE:
        return NmsparseError(f"No permission to write{where}.", "choose another folder with --out")
    if isinstance(error, FileNotFoundError):
        return UsageError(f"There is no file or folder{where}.")
    return NmsparseError(f"File operation failed{where}: {error.strerror or error}.")
