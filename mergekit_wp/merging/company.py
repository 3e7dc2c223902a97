"""Scores and gates that hold for a set of experts together, held against the experts of a merge."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_wp.errors import UserError
from mergekit_wp.merging.expert_scores import ExpertScores


def check_company(files: Sequence[ExpertScores]) -> None:
    """Refuse scores made in the company of other experts than those that are merged.

    Raises:
        UserError: names both companies.
    """
    here = sorted({file.file.manifest.expert.reference for file in files})
    for file in files:
        company = file.file.manifest.company
        if company is None:
            continue
        scored = sorted(member.reference for member in company)
        strangers = [f.path for f in files if f.file.manifest.company != company]
        if scored != here or strangers:
            way_out = (
                "fit these experts together: mergekit-wp fit RECIPE"
                if file.gates
                else "score these experts together: mergekit-wp score --company RECIPE"
            )
            raise UserError(
                f"{file.called} was made in the company of {', '.join(scored)}, but this recipe "
                f"merges {', '.join(here)}"
                + (f", with other scores for some ({strangers[0]})" if strangers else "")
                + f"; {way_out}"
            )
