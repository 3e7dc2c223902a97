"""Which errors make a row of the table "failed": the merge's own, never a bug of ours."""

from __future__ import annotations

from safetensors import SafetensorError

from mergekit_wp.errors import DiskError, OutOfMemory, UserError
from mergekit_wp.interrupts import Interrupted, unmasked
from mergekit_wp.merging.host import raised_by_mergekit
from mergekit_wp.models.memory import is_out_of_memory

#: how mergekit refuses a merge, by torch or by itself
_MERGEKITS = (ValueError, RuntimeError, SafetensorError)
#: what may be a merge's fault; whatever else is raised ends the comparison
MAY_FAIL = (UserError, *_MERGEKITS)
#: a full disk or a small memory is no property of a merge: these stop the comparison
_NOT_THE_MERGES_FAULT = (OSError, DiskError, OutOfMemory)


def why_failed(error: Exception) -> str | None:
    """Why a merge has no scores, in one sentence.

    Args:
        error: one of `MAY_FAIL`, as it was caught.

    Returns:
        None where the merge is not to blame: an interruption, a full disk, or an error that was
        raised neither by mergekit nor to say what is wrong with the merge.
    """
    if isinstance(unmasked(error), Interrupted) or isinstance(error, _NOT_THE_MERGES_FAULT):
        return None
    if isinstance(error, UserError):
        return str(error)
    if not (is_out_of_memory(error) or raised_by_mergekit(error)):
        return None
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"[:500]
