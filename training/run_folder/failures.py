"""Errors of a run, completed by the state of its folder: what was saved, and how the run resumes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import ConfigError, RunError, Terminated, one_line
from training.run_folder.manifest import newest_checkpoint
from training.run_folder.names import STAGING


@contextmanager
def saving_errors(folder: Path) -> Iterator[None]:
    """Turn errors while a run saves into one ``RunError`` that names the folder."""
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError, ConfigError) as error:
        if isinstance(error, RuntimeError):
            # torch.save has no error of its own for a full disk.
            if not re.search("PytorchStreamWriter|inline_container", str(error)):
                raise
            reason = "torch.save could not write all of a file"
        else:
            cause = (isinstance(error, ConfigError) and error.__cause__) or error
            reason = (isinstance(cause, OSError) and cause.strerror) or one_line(cause)
        target = Path(*(part for part in folder.parts if part != STAGING))
        fix = "Free some space there; what was saved before is unchanged"
        raise RunError(f"cannot save to {target} ({reason})", fix) from error


@contextmanager
def explain_how_to_resume(output: Path, resumes_automatically: bool = False) -> Iterator[None]:
    """Add to an interruption or failure of the block how the run can be resumed.

    Args:
        resumes_automatically: ``--resume_from_checkpoint auto`` was given.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_how_to_resume(output, resumes_automatically)) from error
    except Terminated as error:
        raise Terminated(_how_to_resume(output, resumes_automatically)) from error
    except RunError as error:
        raise RunError(str(error), _how_to_resume(output, resumes_automatically)) from error


def _how_to_resume(output: Path, resumes_automatically: bool) -> str:
    newest = newest_checkpoint(output)
    if resumes_automatically:
        return f"The same command resumes from {newest}" if newest else "The same command starts over"
    if newest is not None:
        return f"The same command with --resume_from_checkpoint {newest} resumes from there"
    return "No checkpoint was saved: the same command with --overwrite_output_dir starts over"
