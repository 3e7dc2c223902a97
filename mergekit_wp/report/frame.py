"""Tables for pandas, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_wp.errors import UserError


def frame(records: Sequence[Mapping[str, Any]]) -> Any:
    """A pandas frame with a row for each record and its keys as columns.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise UserError(
            "a frame needs pandas, which is not installed: pip install 'mergekit-wp[frame]'"
        ) from error
    return pandas.DataFrame.from_records(list(records))
