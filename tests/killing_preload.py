"""What the processes of `tests.killing` are forked with: imports alone, nothing run."""

import mergekit_wp.cli
import mergekit_wp.commands.compare
import mergekit_wp.commands.fit
import mergekit_wp.commands.merge
import mergekit_wp.commands.score
import mergekit_wp.commands.trace
import mergekit_wp.commands.verify
import mergekit_wp.comparison.request
import mergekit_wp.comparison.run
import mergekit_wp.joint.fit
import mergekit_wp.mechanism.circuit
import mergekit_wp.mechanism.verify  # noqa: F401
