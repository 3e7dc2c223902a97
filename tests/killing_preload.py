"""What the processes of `tests.killing` are forked with: imports alone, nothing run."""

import mergekit_wp.cli
import mergekit_wp.commands.compare
import mergekit_wp.commands.fit
import mergekit_wp.commands.merge
import mergekit_wp.commands.score
import mergekit_wp.commands.trace
import mergekit_wp.commands.verify
import mergekit_wp.compare.items
import mergekit_wp.compare.request
import mergekit_wp.compare.run
import mergekit_wp.scoring.company
import mergekit_wp.scoring.fit
import mergekit_wp.scoring.score
import mergekit_wp.scoring.tracing
import mergekit_wp.scoring.verify  # noqa: F401
