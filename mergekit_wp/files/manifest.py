"""What a score file says of itself: the JSON under the metadata key ``mergekit_wp``."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mergekit_wp.architectures import Dims
from mergekit_wp.components import GateLayout, gate_layouts, layout_of
from mergekit_wp.errors import UserError
from mergekit_wp.files.fit_section import Fit
from mergekit_wp.files.untrusted import StrictModel
from mergekit_wp.terms import (
    SLICED_KINDS,
    CriterionName,
    Direction,
    Estimand,
    GateGranularity,
    Kind,
    ScoringMethod,
    SetName,
)

FORMAT_VERSION = 1
#: bootstrap draws over prompts, of which a file says in how many each component leads
DRAWS = 200
#: criteria of one file; a manifest of strangers names what is made of them before it is read
MAX_CRITERIA = 64


class Omitting(StrictModel):
    """What writes nothing of some entries where they are None, as files of before they were."""

    omitted: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = dump(self)
        return {k: v for k, v in said.items() if v is not None or k not in self.omitted}


class ModelId(StrictModel):
    """Which checkpoint was scored."""

    reference: str
    revision: str | None
    config_hash: str
    #: dtype the weights are stored in; merges cast down from it are compared less strictly
    weights_dtype: str


class Anchor(StrictModel):
    """The vector anchor: where it was taken and how well it separates.

    ``separation`` is the effect size on held-out prompts, None with too few prompts to hold out.
    """

    layer: int
    contrast: Literal["instruction", "checkpoint"]
    separation: float | None
    n_contrasts: int


class Fidelity(Omitting):
    """How the scores of one estimand/criterion/kind were computed, and how far to trust them.

    For estimates from gradients, ``verified_top`` leaders and ``verified_random`` uniformly drawn
    components were swapped exactly; the correlations are between the two, over all verified
    components and over the random ones alone, and ``largest_missed`` is the largest exact
    |score| among random components that are not leaders.

    ``swapped`` are the places, flat, of all components whose scores are exact, for the file has
    what their swap gave; all others are estimates. ``largest_error`` is the largest difference of
    the two among leaders and random ones. ``bound`` is that added to the largest |estimate| of the
    others: no exact |score| among them is expected to be larger. None where nothing was swapped, or
    everything.
    """

    omitted: ClassVar = ("swapped", "largest_error", "bound")

    method: ScoringMethod
    steps: int | None = None
    verified_top: int = 0
    verified_random: int = 0
    pearson: float | None = None
    spearman: float | None = None
    pearson_random: float | None = None
    largest_missed: float | None = None
    swapped: tuple[NonNegativeInt, ...] | None = None
    largest_error: float | None = None
    bound: float | None = None

    @property
    def estimated(self) -> bool:
        """Whether scores are estimates from gradients, but for those of ``swapped`` components."""
        return self.method in ("first-order", "second-order")


class Scale(StrictModel):
    """Raw criterion value at the base and at the expert (means over prompts)."""

    base: float
    expert: float


class CompanyMember(StrictModel):
    """One of the experts that were fitted together.

    ``weights_sha256`` is over the content of its weight files; ``recovery`` is how far its
    behaviour comes back by the gates (0 at the base, 1 at the expert).
    """

    reference: str
    weights_sha256: str
    behavior: str
    recovery: float


class SetPoint(StrictModel):
    """One point of a verification: a set of components swapped together, with its 95% interval.

    ``direction``: base plus the set (restoration: how far it gets, 0 to 1), or expert minus the set
    (knockout: how much it loses). ``measure`` is a criterion or "behavior" (checked answers).
    """

    direction: Direction
    set: SetName
    size: PositiveInt
    measure: CriterionName
    value: float
    low: float
    high: float


class Verification(Omitting):
    """What the leading components do together, beside the last ones and random ones.

    ``n_components``: how many there are in all, None in files of before they were counted.
    ``template_date``: the day that the chat template wrote, None where it read none.
    """

    omitted: ClassVar = ("n_components", "template_date")

    estimand: Estimand
    criterion: CriterionName
    prompts_sha256: str
    n_prompts: PositiveInt
    n_items: int
    n_components: PositiveInt | None = None
    draws: PositiveInt
    points: tuple[SetPoint, ...]
    seed: int
    #: arguments of `mergekit-wp` but for the file, and versions, see `runs.command`
    command: tuple[str, ...]
    versions: dict[str, str]
    template_date: str | None = None

    @model_validator(mode="after")
    def _whole_curves(self) -> Self:
        sizes: dict[tuple[str, str, str], list[int]] = {}
        for point in self.points:
            sizes.setdefault((point.measure, point.direction, point.set), []).append(point.size)
        wanted = {
            (point.measure, direction, name)
            for point in self.points
            for direction in get_args(Direction)
            for name in get_args(SetName)
        }
        if set(sizes) != wanted:
            raise ValueError("points: a curve is missing")
        if any(
            sorted(of) != sorted(set(sizes[key[0], "restoration", "top"]))
            for key, of in sizes.items()
        ):
            raise ValueError("points: the curves have other sizes, or one twice")
        return self


class Agreement(Omitting):
    """How alike two rankings of the same components are.

    ``against``: "halves" are two random halves of the prompts (mean and 95% range over splits);
    "run" is another scoring of this expert on this behaviour, "behavior" this expert on another
    behaviour, "expert" another expert (of another training seed, say). There the interval is a
    bootstrap over layers. ``name`` says which other file it was, "" for halves. ``needed``: by how
    many prompts two rankings would share four fifths of their leaders, extrapolated from halves;
    None where that is no halves' to say, or too far off.
    """

    omitted: ClassVar = ("needed",)

    against: Literal["halves", "run", "behavior", "expert"]
    name: str
    estimand: Estimand
    criterion: CriterionName
    kind: Kind
    spearman: float
    low: float
    high: float
    #: Jaccard overlap of the two top `top`
    jaccard: float
    top: PositiveInt
    needed: PositiveInt | None = None


class Manifest(Omitting):
    """The JSON under the metadata key ``mergekit_wp``.

    ``responses`` says whose answers the prompts were continued with: the prompt file's, the
    expert's own, or some of each. ``company`` names the experts that were fitted together, this
    one among them, and ``fit`` says how `mergekit-wp fit` made the ``path`` scores; both are None
    for an expert scored alone. ``template_date`` is the day that the chat template
    wrote into the prompts, None where it read none. ``tensor_shapes``, in the order of
    ``tensor_names``, say how many gates each has where these are finer than components; None
    elsewhere. ``left_out`` says by criterion which prompts, from 0, had too small a distance to be
    divided by it; None where scores are quotients of means. ``prompt_digests``, see
    `prompts.prompt.text_digest`, tell whether something is asked that the file was made with; None
    in files that do not say it.
    """

    omitted: ClassVar = ("prompt_digests", "fit", "template_date", "tensor_shapes", "left_out")

    format_version: int = FORMAT_VERSION
    base: ModelId
    expert: ModelId
    behavior: str
    n_prompts: PositiveInt
    prompts_sha256: str
    prompt_digests: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...] | None = None
    responses: Literal["given", "expert", "mixed"]
    template_date: str | None = None
    architecture: str
    n_layers: PositiveInt
    n_heads: NonNegativeInt
    n_kv_groups: NonNegativeInt
    n_neurons: NonNegativeInt
    hidden_size: PositiveInt
    criteria: Annotated[tuple[CriterionName, ...], Field(max_length=MAX_CRITERIA)]
    estimands: tuple[Estimand, ...]
    kinds: tuple[Kind, ...]
    anchor: Anchor | None
    scale: dict[CriterionName, Scale]
    left_out: dict[CriterionName, tuple[NonNegativeInt, ...]] | None = None
    fidelity: dict[str, Fidelity]
    noise_floor: dict[CriterionName, float]
    completeness: dict[str, float]
    tensor_names: tuple[str, ...]
    tensor_shapes: tuple[Annotated[tuple[PositiveInt, ...], Field(max_length=8)], ...] | None = None
    company: tuple[CompanyMember, ...] | None
    fit: Fit | None = None
    verification: Verification | None = None
    stability: tuple[Agreement, ...] = ()
    dtype: str
    seed: int
    #: arguments of `mergekit-wp` that made the file, see `runs.command`
    command: tuple[str, ...] = ()
    created: str
    versions: dict[str, str]

    @model_validator(mode="after")
    def _tensors_fit(self) -> Self:
        if len(set(self.tensor_names)) != len(self.tensor_names):
            raise ValueError("tensor_names holds a name twice")
        for field in (self.estimands, self.criteria, self.kinds):
            if len(set(field)) != len(field):
                raise ValueError(f"{', '.join(field)}: a name stands twice")
        for kind in SLICED_KINDS:
            if kind in self.kinds and not self.dims.count(kind):
                raise ValueError(f"n_{kind}s is 0, but kinds has '{kind}'")
        fitted = ("path" in self.estimands, self.company is not None, self.fit is not None)
        if self.prompt_digests is not None and len(self.prompt_digests) != self.n_prompts:
            raise ValueError(f"prompt_digests are not those of {self.n_prompts} prompts")
        if any(fitted) != all(fitted):
            raise ValueError("'path' scores, a 'company' and a 'fit' belong together")
        if self.fit is not None:
            self._check_fit(self.fit)
        self._check_gates()
        for key in set(self.score_keys()) & set(self.fidelity):
            count = prod(self.shape(key.split("/")[2]))  # type: ignore[arg-type]
            if any(place >= count for place in self.fidelity[key].swapped or ()):
                raise ValueError(f"fidelity of '{key}': a swapped place is not below {count}")
        if self.anchor is not None and not 0 <= self.anchor.layer < self.n_layers:
            raise ValueError(f"the anchor lies in layer {self.anchor.layer} of {self.n_layers}")
        for name in self.tensor_names:
            layer = layout_of(name, self.dims).layer
            if layer is not None and layer >= self.n_layers:
                raise ValueError(f"tensor '{name}' lies in no layer of the model")
        return self

    def _check_fit(self, fit: Fit) -> None:
        names = {member.behavior for member in self.company or ()} | {
            g.behavior for g in fit.guards
        }
        for moment in fit.history:
            if any(
                found is not None and set(found) != names
                for found in (moment.fitted, moment.judged)
            ):
                raise ValueError(f"history: step {moment.step} is of other behaviours")
        for point in fit.front:
            if set(point.reached) != names:
                raise ValueError(f"front: limit {point.limit:g} is of other behaviours")

    def _check_gates(self) -> None:
        if (self.tensor_shapes is not None) != (self.granularity != "component"):
            raise ValueError("'tensor_shapes' and a 'fit' finer than components belong together")
        if self.tensor_shapes is None:
            return
        if len(self.tensor_shapes) != len(self.tensor_names):
            raise ValueError("tensor_shapes is not as long as tensor_names")
        try:
            self.gate_layouts  # noqa: B018
        except UserError as error:
            raise ValueError(f"tensor_shapes: {error}") from None

    @property
    def granularity(self) -> GateGranularity:
        """What each gate of the file covers."""
        return "component" if self.fit is None else self.fit.granularity

    @property
    def gate_layouts(self) -> dict[str, GateLayout]:
        """How gates finer than components lie in every tensor; empty where there are none."""
        if self.tensor_shapes is None:
            return {}
        shapes = dict(zip(self.tensor_names, self.tensor_shapes, strict=True))
        return gate_layouts(self.dims, shapes, self.granularity)

    @property
    def finer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that hold gates finer than components, by name."""
        if self.tensor_shapes is None:
            return {}
        count = sum(layout.count for layout in self.gate_layouts.values())
        return {f"path/{criterion}/{self.granularity}": (count,) for criterion in self.criteria}

    def path_bound(self, kind: str) -> float:
        """The largest ``path`` score.

        Args:
            kind: of component, or a granularity. Where a gate of a row and one of a column are
                added, their sums, of which components have the means, reach twice as far.
        """
        assert self.fit is not None  # see the validator
        upper = self.fit.upper
        added = self.granularity == "row_column" and kind != "row_column"
        return 2 * upper if added else upper

    @property
    def known_prompts(self) -> tuple[str, ...]:
        """Hashes of the prompt files it was made with: its own, and the guards of its fit."""
        guards = () if self.fit is None else self.fit.guards
        return (self.prompts_sha256, *(guard.prompts_sha256 for guard in guards))

    @property
    def dims(self) -> Dims:
        """The dimensions that fix the components."""
        return Dims.named(
            self.architecture, self.n_layers, self.n_heads, self.n_kv_groups, self.n_neurons
        )

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of a score tensor of one kind."""
        return {
            "layer": (self.n_layers,),
            "tensor": (len(self.tensor_names),),
            "head": (self.n_layers, self.n_heads),
            "kv_group": (self.n_layers, self.n_kv_groups),
            "neuron": (self.n_layers, self.n_neurons),
        }[kind]

    def score_keys(self) -> list[str]:
        """Names of all score tensors this manifest promises."""
        return [f"{e}/{c}/{k}" for e in self.estimands for c in self.criteria for k in self.kinds]
