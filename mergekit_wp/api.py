"""What a notebook calls, and every command: `import mergekit_wp as wp`; wp.score(...).

Options beside the arguments that stand here are the fields of the request a function makes, which
docs/api.md lists. A mistake in any of them is a `UserError`: one sentence. Nothing is written to
disk unless a path is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_wp.architectures import register as register_architecture
from mergekit_wp.autoload import ensure_registered
from mergekit_wp.card.write import write_card
from mergekit_wp.comparison.compare import ComparisonResult
from mergekit_wp.comparison.compare import compare as _compare
from mergekit_wp.comparison.suites.prepare import requested
from mergekit_wp.errors import UserError
from mergekit_wp.files import scorefile
from mergekit_wp.joint.files import RECIPE, kept_settings
from mergekit_wp.joint.finished import finished
from mergekit_wp.joint.fit import fit as _fit
from mergekit_wp.joint.request import FitRequest, by_name, experts_of, guards_of
from mergekit_wp.mechanism.anchors import LayerAnchor
from mergekit_wp.mechanism.anchors import find_anchors as _find_anchors
from mergekit_wp.mechanism.circuit import trace as _trace
from mergekit_wp.mechanism.request import AnchorRequest, TraceRequest, VerifyRequest
from mergekit_wp.mechanism.stability import stability
from mergekit_wp.mechanism.verify import items_of
from mergekit_wp.mechanism.verify import verify as _verify
from mergekit_wp.merging.merge import check_free
from mergekit_wp.merging.merge import merge as _merge
from mergekit_wp.merging.states import fuse_states
from mergekit_wp.models.hub import local_path
from mergekit_wp.models.model_names import place_of
from mergekit_wp.prompts import prompt_source
from mergekit_wp.results import Mergeable, PathLike, Scores, ScoresTogether, recipe_for, recipes_for
from mergekit_wp.runs.progress import Progress, shown_by
from mergekit_wp.scoring.request import ScoreRequest
from mergekit_wp.scoring.score import score as _score

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_wp.criteria import CriterionFunction
    from mergekit_wp.files.circuitfile import TraceFile
    from mergekit_wp.files.manifest import Verification
    from mergekit_wp.tasks.items import JsonlTask

__all__ = [
    "compare",
    "find_anchors",
    "fit",
    "fuse",
    "load_scores",
    "merge",
    "merge_experts",
    "register_architecture",
    "score",
    "score_together",
    "stability",
    "trace",
    "verify",
]


def score(
    base: PathLike,
    expert: PathLike,
    *,
    prompts: Any,
    criterion: str | CriterionFunction | Sequence[str | CriterionFunction] | None = None,
    out: PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Scores:
    """Measure how much of an expert's behaviour each component of its weights carries.

    Args:
        base: a folder or a Hub id (``owner/name@revision``).
        expert: the same, of the same architecture; ``MODEL+ADAPTER`` is one with a LoRA adapter.
        prompts: what elicits the behaviour: a source (docs/prompts.md), such as a file or
            ``hf:owner/dataset``; or texts, chats (lists of messages), objects with ``prompt`` and
            optional ``contrast`` and ``response``; a dataset of these.
        criterion: names, or functions of ``(logits, batch)`` that return ``[prompts]``; base and
            expert set their 0 and 1.
        out: score file to write; a killed run goes on from what is kept beside it.
        progress: show a bar; or where to report instead.
        options: fields of `ScoreRequest`: ``estimand``, ``kinds``, ``verify``, ``dtype``, ...

    Raises:
        UserError: any mistake in the inputs.
    """
    request = ScoreRequest.of(
        base=place_of(base, "base"),
        expert=place_of(expert, "expert"),
        prompts=prompt_source(prompts),
        criterion=criterion,
        out=out,
        **options,
    )
    with shown_by(progress) as shown:
        return Scores(_score(request, shown))


def fit(
    base: PathLike | None = None,
    experts: Mapping[str, PathLike] | None = None,
    *,
    prompts: Mapping[str, Any] | Sequence[Any] | PathLike,
    guards: Sequence[Any] | PathLike = (),
    recipe: PathLike | tuple[str, ...] | None = None,
    out: PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> ScoresTogether:
    """Fit the gates of all experts together, by gradient.

    Args:
        base: a folder or a Hub id.
        experts: folders or Hub ids by names of your choice.
        prompts: of each expert, by its name; see `score`. The expert's answers are the target. Of
            an only expert, a file or a dataset's name will do without it.
        guards: prompts on which the merge is to stay like the base: a source, or a list of sources
            or of lists of prompts. Without any, plain text of the package's own;
            ``unguarded=True`` for none.
        recipe: a mergekit recipe that names base and experts, in their place.
        out: folder for a score file of every expert, and a recipe that merges by them.
        progress: show a bar; or where to report instead.
        options: fields of `FitRequest`: ``granularity``, ``steps``, ``prompts_a_step``, ...

    Raises:
        UserError: any mistake in the inputs.
    """
    request = _fit_request(base, experts, recipe, prompts, guards, out=out, **options)
    with shown_by(progress) as shown:
        return ScoresTogether(_fit(request, shown), kept_settings(request.recipe))


def _fit_request(
    base: PathLike | None,
    experts: Mapping[str, PathLike] | None,
    recipe: PathLike | tuple[str, ...] | None,
    prompts: Mapping[str, Any] | Sequence[Any] | PathLike,
    guards: Sequence[Any] | PathLike,
    **options: Any,
) -> FitRequest:
    ensure_registered()
    return FitRequest.of(
        recipe=experts_of(base, experts, recipe),
        prompts=by_name(prompts),
        guards=guards_of(guards),
        **options,
    )


#: experts are scored together by fitting them
score_together = fit


def load_scores(path: PathLike) -> Scores:
    """Read and check a score file, here or on the Hub (``hf://owner/repo[@revision]/FILE``).

    Raises:
        UserError: missing, unreadable or inconsistent; names the file.
    """
    return Scores(scorefile.read(local_path(place_of(path, "path"))))


def merge(
    what: Mergeable,
    out: PathLike,
    options: MergeOptions | None = None,
    *,
    overwrite: bool = False,
    progress: bool | Progress = True,
) -> None:
    """Merge experts into a folder, with a model card; it appears only when it is complete.

    Args:
        what: scores, fitted together or made one by one; score files; or a recipe of any
            method, as a file or as what it holds.
        out: the folder.
        options: mergekit's.
        overwrite: replace a model, or files of it, that are there already.
        progress: show mergekit's bars, and say where the merge has another tokenizer than an
            expert; or where to say it.

    Raises:
        UserError: any mistake in the recipe, its score files and its models.
    """
    from mergekit.options import MergeOptions

    ensure_registered()
    with shown_by(progress) as shown, recipe_for(what) as recipe:
        _merge(
            recipe,
            out,
            options or MergeOptions(quiet=progress is False),
            write_card,
            shown.note,
            overwrite=overwrite,
            plan=shown.plan,
        )


def merge_experts(
    base: PathLike | None = None,
    experts: Mapping[str, PathLike] | None = None,
    *,
    prompts: Mapping[str, Any] | Sequence[Any],
    out: PathLike,
    guards: Sequence[Any] = (),
    recipe: PathLike | tuple[str, ...] | None = None,
    options: MergeOptions | None = None,
    overwrite: bool = False,
    progress: bool | Progress = True,
    **fit_options: Any,
) -> ScoresTogether:
    """Fit experts together and merge them: the whole job, from models and prompts to a model.

    Every step can be taken again by itself: the folder ``merge`` in the output holds the score
    files and the recipe that merges by them. Where that fit is finished already, only the merge is
    made.

    Args:
        base: a folder or a Hub id.
        experts: folders or Hub ids by names of your choice.
        prompts: of each expert, by its name; see `score`.
        out: folder for the merged model.
        guards: see `fit`.
        recipe: a mergekit recipe that names base and experts, in their place.
        options: mergekit's.
        overwrite: replace a model, and a fit, that are there already.
        progress: show a bar; or where to report instead.
        fit_options: fields of `FitRequest`: ``steps``, ``rate``, ...

    Raises:
        UserError: any mistake in the inputs.
    """
    from mergekit.options import MergeOptions

    options = options or MergeOptions(quiet=progress is False)
    check_free(Path(out), options, overwrite)
    steps = Path(out, "merge")
    fit_options |= {"out": steps, "overwrite": overwrite}
    request = _fit_request(base, experts, recipe, prompts, guards, **fit_options)
    with shown_by(progress) as shown:
        found = finished(request, Path(out), shown) or _fit(request, shown)
        merge(steps / RECIPE, out, options, overwrite=overwrite, progress=shown)
    return ScoresTogether(found, kept_settings(request.recipe))


def fuse(
    base: Mapping[str, torch.Tensor],
    experts: Mapping[str, Mapping[str, torch.Tensor]],
    scores: Mapping[str, Scores],
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge state dicts in memory by scores: B + Σ gate_e (E_e − B), tensor by tensor.

    Args:
        base: parameters by name.
        experts: the same of each expert, by a name of your choice.
        scores: of each expert, by the same name.
        parameters: a recipe's ``fusion``, ``power``, ``lambda``, ``estimand``, ``criterion``,
            ``granularity``, with its defaults; ``weight`` and ``density``, one number or one for
            each expert.

    Returns:
        The merged parameters, in the base's dtypes. Those that no scores cover, or no gate moves,
        may be the base's own tensors.

    Raises:
        UserError: names that do not fit; an unknown parameter or a bad value; scores of other
            models, or without what is asked for.
    """
    for name, own in scores.items():
        if not isinstance(own, Scores):
            raise UserError(f"scores of '{name}': expected Scores, such as wp.load_scores(FILE) is")
    files = {name: own.file for name, own in scores.items()}
    return fuse_states(base, experts, files, **parameters)


def compare(
    *what: Mergeable,
    tasks: Sequence[PathLike] | PathLike = (),
    prompts: Mapping[str, Any] | Sequence[Any] = (),
    suite: PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> ComparisonResult:
    """Compare a merge by scores with other methods, on your own items.

    Args:
        what: the merge in question, see `merge`; then recipes of the same models, if any.
        tasks: sources of items (docs/prompts.md), ``NAME=SOURCE``, or tasks of lm-eval.
        prompts: of each expert, by its name, for methods that learn from them.
        suite: a file that says all of this (docs/suites.md); its experts are fitted first.
        progress: show a bar; or where to report instead.
        options: fields of `CompareRequest`: ``methods``, ``untuned``, ``out``, ...

    Returns:
        An object with ``table()``, ``frame()`` and ``report()``.

    Raises:
        UserError: any mistake that shows before the first merge.
    """
    with shown_by(progress) as shown, recipes_for(what) as recipes:
        every = tasks if isinstance(tasks, Sequence) and not isinstance(tasks, str) else [tasks]
        named = tuple(place_of(task, "tasks") for task in every)
        given = options | {"recipes": recipes, "tasks": named, "prompts": by_name(prompts)}
        return _compare(requested(suite, given, shown), shown)


def verify(
    file: PathLike,
    *,
    prompts: Any,
    top: str | Sequence[str],
    items: JsonlTask | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> Verification:
    """Swap the leading components of a score file together: restoration and knockout of sets.

    Args:
        file: the score file; what is found is written into its manifest.
        prompts: that it was not scored on, see `score`.
        top: sizes of sets, as numbers or percentages: ``"1%,5%"``.
        items: a task whose answers are checked as well.
        progress: show a bar; or where to report instead.
        options: fields of `VerifyRequest`: ``estimand``, ``criterion``, ``draws``, ...

    Raises:
        UserError: any mistake in the inputs.
    """
    request = VerifyRequest.of(file=file, prompts=prompt_source(prompts), top=top, **options)
    with shown_by(progress) as shown:
        return _verify(request, items_of(request, items), shown)


def trace(
    file: PathLike,
    *,
    prompts: Any,
    out: PathLike | None = None,
    progress: bool | Progress = True,
    **options: Any,
) -> TraceFile:
    """Find who supplies the components that matter: carriers, routers and executors.

    Args:
        file: a score file with ``activation_gain``.
        prompts: see `score`.
        out: JSON to write.
        progress: show a bar; or where to report instead.
        options: fields of `TraceRequest`: ``targets``, ``suppliers``, ``rules``, ...

    Raises:
        UserError: any mistake in the inputs.
    """
    request = TraceRequest.of(file=file, prompts=prompt_source(prompts), out=out, **options)
    with shown_by(progress) as shown:
        return _trace(request, shown)


def find_anchors(
    base: PathLike,
    expert: PathLike,
    *,
    prompts: Any,
    progress: bool | Progress = True,
    **options: Any,
) -> list[LayerAnchor]:
    """Look for a direction that stands for a behaviour, layer by layer.

    Args:
        base: a folder or a Hub id.
        expert: the same.
        prompts: with contrasts, see `score`.
        progress: show a bar; or where to report instead.
        options: fields of `AnchorRequest`: ``strength``, ``max_prompts``, ...

    Raises:
        UserError: fewer than four contrasts, or any other mistake in the inputs.
    """
    request = AnchorRequest.of(
        base=place_of(base, "base"),
        expert=place_of(expert, "expert"),
        prompts=prompt_source(prompts),
        **options,
    )
    with shown_by(progress) as shown:
        return _find_anchors(request, shown)
