"""The vocabulary of methods: a recipe says which rows a method trains on and by which rule; an edit computes weights.

A row is a latent on a sampling trajectory of the frozen teacher, what the student is asked there, and a target: a
linear mix of the teacher's own predictions.  Nothing in a recipe depends on the student, so rows are made in advance.
How the rows' losses become steps is a rule (``rules.py``).  An edit needs neither rows nor steps: it computes new
weights in closed form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .rules import Rule

Role = Literal["forget", "retain"]
Reader = Literal["text", "pooled"]  # matrices that read the text: fields of Weights
ROLES: tuple[Role, ...] = ("forget", "retain")
EMPTY = ""  # a prompt like any other
# Of what a prompt is encoded to, (L, D) and (L,): the states that the denoiser reads, and, where it is told, which.
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
# Names that stand where a prompt does; no prompt holds this sign.
UNCONDITIONAL = "\0unconditional"  # what guidance leads away from: "" to some families of models, not to all
NEGATIVE = "\0negative"  # what the user has it lead away from instead; never a part of a target
NOISE = "\0noise"  # in a target: the noise itself


def picture(name: str) -> str:
    """What the picture ``name`` of a recipe's ``pictures`` is called where a row could name a prompt."""
    return f"\0picture/{name}"


def found(name: str) -> str:
    """What an embedding that a :class:`Search` finds is called."""
    return f"\0found/{name}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of training example; the bank makes it at every point of the trajectories it is given.

    At ``x_t`` from the teacher's trajectory for the prompt ``trajectory``, the student, asked with ``condition``, is
    compared with ``sum_k target[k] * teacher(x_t, t, k)``, where each k is a prompt or
    :data:`UNCONDITIONAL`.  A target of :data:`NOISE` alone is the usual training loss: x_t is then the trajectory's
    last latents with fresh noise, and the target what was added (or the velocity, where that is what the model
    predicts).

    A prompt may be the name of one of the recipe's ``embeddings``.  A :func:`picture` as the trajectory makes x_t from
    that picture and fresh noise, and in a target it stands for the prediction that leads from x_t to it; there the
    family's noise share s_t is in the denominator, which ``noise_power`` 2 takes out of the squared error again.

    ``weight`` times ``s_t ** noise_power`` multiplies the row's squared error, s_t being the factor of the noise in
    x_t: 1 at pure noise, nearly 0 at the image.
    ``timesteps`` keeps the points of a window of the trajectory, in shares of its points in the sampler's order: 0 is
    the first point, pure noise, and 1 the end, the image.  So (0.0, 0.2) are the first fifth, where the layout is made,
    whatever numbers the sampler gives to its timesteps.
    """

    role: Role
    trajectory: str
    condition: str
    target: Mapping[str, float]
    weight: float = 1.0
    timesteps: tuple[float, float] | None = None
    noise_power: float = 0.0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a row's role is one of {ROLES}, got {self.role!r}.")
        total = math.fsum(self.target.values())
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            # Only then does the algebra hold for epsilon, v and flow models alike.
            raise ValueError(f"a row's target mix must sum to 1, got {total:g} from {dict(self.target)}.")
        if NOISE in self.target and len(self.target) > 1:
            raise ValueError(f"a row's target is noise or a mix of predictions, not both, got {dict(self.target)}.")
        pictures = [key for key in self.target if key.startswith(picture(""))]
        if pictures and not self.trajectory.startswith(picture("")):
            raise ValueError("a picture may be the target of rows of pictures alone.")
        for name, value in (("weight", self.weight), ("noise_power", self.noise_power)):
            if not math.isfinite(value):
                raise ValueError(f"a row's {name} must be a finite number, got {value}.")
        if self.timesteps is not None and not 0 <= self.timesteps[0] < self.timesteps[1] <= 1:
            raise ValueError(f"a row's timesteps are a window (first, last) within 0 and 1, got {self.timesteps}.")

    def window(self, points: int) -> range:
        """Which of a trajectory's ``points`` the row is made at.  Raises UserError for a window that holds none."""
        first, last = self.timesteps or (0.0, 1.0)
        window = range(math.ceil(first * points - 1e-9), math.ceil(last * points - 1e-9))
        if not window:
            raise UserError(
                f"a row's window of timesteps {self.timesteps} holds none of a trajectory's {points} points. Use more "
                "`--trajectory-steps`."
            )
        return window


def mix(*parts: tuple[str, float]) -> dict[str, float]:
    """A target from (prompt, coefficient) parts; a prompt named twice counts with the sum."""
    target: dict[str, float] = {}
    for prompt, coefficient in parts:
        target[prompt] = target.get(prompt, 0.0) + coefficient
    return target


@dataclasses.dataclass(frozen=True)
class Search:
    """An embedding to be found before the rows are made: the states of the prompt ``start`` plus one offset d.

    At points of the trajectories of ``concept``, with the frozen teacher T and ``n`` for ``neutral``, or 0 without,

        mean( (T(start + d) - T(n)) * (T(concept) - T(n)) )

    falls by Adam until it is below 0, or for ``steps`` steps.  The first position's states stay.
    """

    name: str
    start: str
    concept: str
    neutral: str | None
    steps: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Inner:
    """An attack inside every step: the forget rows' conditions get the offset that the student answers worst.

    ``steps`` steps of projected sign descent, each of a quarter of the ``radius``, look for the offset of the text
    states, at most ``radius`` times their root mean square in every number, with which the student comes nearest to
    what the teacher predicts for the row's trajectory.  Not in the first ``warm_up`` share of the training.
    """

    steps: int
    radius: float
    warm_up: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pursuit:
    """An attack that goes on beside the training: offsets of the text states that are carried from step to step.

    An offset d is one vector, added to the states at all places but the first.  A step's forget rows are dealt to
    ``offsets`` of them in turn, and every ``offsets`` + 1st row is asked as it is.  The student answers a row at its
    offset, and from the same forward the offset makes a step of Adam, by ``rate`` times the states' root mean square,
    down the mean over its rows of

        |S(x_t, t, c + d) - T(x_t, t, concept)|^2,

    the concept being the row's trajectory.  After ``lifetime`` steps an offset begins at 0 again, one after another.
    """

    offsets: int
    rate: float
    lifetime: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a method trains on.  No rows means that nothing is trained.

    ``embeddings``: name -> the tensors that a prompt's encoding would be, by argument of the denoiser, without a batch
    dimension, e.g. ``{"encoder_hidden_states": (L, D)}``.  A row names them where it could name a prompt.
    ``searches``: embeddings that are found first; a row names them by :func:`found`.
    ``pictures``: name -> image file, of the model's size; a row names them by :func:`picture`.
    ``start``: an edit of the weights that training starts from.  The rows are of the weights before it.
    ``inner``: an attack inside every step.  ``pursuit``: one that goes on beside them.
    ``elastic``: lambda of ``lambda * sum_i F_i (w_i - w0_i)^2``, added to every update's loss (elastic weight
    consolidation).  w0 are the weights that training starts from and F_i the Fisher information of the retain rows,
    whose targets must be noise: the mean over trajectories of ``(sum over all timesteps of the gradient)^2``.
    """

    rows: Sequence[Row]
    rule: Rule
    embeddings: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    searches: Sequence[Search] = ()
    pictures: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    start: Edit | None = None
    inner: Inner | None = None
    pursuit: Pursuit | None = None
    elastic: float = 0.0

    def __post_init__(self) -> None:
        if self.elastic and any(row.role == "retain" and NOISE not in row.target for row in self.rows):
            raise ValueError("the Fisher information is that of retain rows whose target is noise.")
        if (self.inner or self.pursuit) and any(row.role == "forget" and has_no_teacher(row) for row in self.rows):
            raise ValueError("an attack needs forget rows of prompts, whose target is no noise.")

    def prompts(self) -> list[str]:
        """Every prompt that must be encoded, each once, the unconditional first."""
        prompts = [UNCONDITIONAL]
        for row in self.rows:
            prompts += [row.trajectory, row.condition, *(key for key in row.target if key != NOISE)]
        for search in self.searches:
            prompts += [search.start, search.concept, *([search.neutral] if search.neutral is not None else [])]
        others = {*self.embeddings, *map(picture, self.pictures), *(found(search.name) for search in self.searches)}
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in others]


def has_no_teacher(row: Row) -> bool:
    """Whether there is no prediction of the teacher's for the row's own prompt, or none for it to become."""
    return NOISE in row.target or row.trajectory.startswith(picture(""))


@dataclasses.dataclass(frozen=True)
class Suppression:
    """Low-rank changes to be trained inside an edit, so that the image attends less to some places of its prompts.

    ``places``: prompt -> the positions of its text states.  On the teacher's own images of the prompts, with noise,

        mean over rows of the sum over cross-attentions of |A[.., places]|,   A = softmax(q k^T / sqrt(d))

    falls by AdamW for ``steps`` steps, as a function of the factors B A of this ``rank``, which are added to the
    matrices.  |.| is the root of the sum of squares over heads, pixels and places.
    ``importance``: how often a timestep t of 1000 is drawn, to a factor; None for equally often.
    """

    places: Mapping[str, Sequence[int]]
    rank: int
    steps: int
    learning_rate: float
    importance: Callable[[float], float] | None = None


def _no_suppression(values: Mapping[str, Tensor], wanted: Suppression) -> Mapping[str, Tensor]:
    raise RuntimeError("weights without a model have no attention")


def _no_gradient() -> Mapping[str, Tensor]:
    raise RuntimeError("weights without a model have no gradient")


@dataclasses.dataclass(frozen=True)
class Weights:
    """What an edit is given.

    ``parameters``: the denoiser's parameters that may change, name -> float32; an edit must not write to them.
    ``text``: the names of those that are the matrix W of a layer W c, or W c + b, on the text encoder's states c.
    ``pooled``: likewise of a layer on one vector of the whole text, which some families have beside the states.
    ``before``: for those of them that are given something else than the states, as where a norm comes first, what it
    is: from the denoiser's conditions, by argument, to (n, L, D).
    ``facts``: numbers by name that the edit wants the record to state, such as a condition number; it adds to them.
    ``gradient``: computes the gradient of the concept's denoising loss, ``|S(x_t, t, c) - noise|^2`` on its own
    generations, name -> float32.
    ``suppressed``: trains a :class:`Suppression` of the edit's on matrices of these values, (out, in) by name; returns
    the change B A of each, float32.
    """

    parameters: Mapping[str, Tensor]
    text: tuple[str, ...]
    pooled: tuple[str, ...] = ()
    before: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = dataclasses.field(default_factory=dict)
    facts: dict[str, float] = dataclasses.field(default_factory=dict)
    gradient: Callable[[], Mapping[str, Tensor]] = _no_gradient
    suppressed: Callable[[Mapping[str, Tensor], Suppression], Mapping[str, Tensor]] = _no_suppression


@dataclasses.dataclass(frozen=True)
class Edit:
    """Weights to weights, in closed form: no rows, no steps.

    ``change`` returns new values, float32 and of the same shape, for any of the parameters that it is given.
    ``reads``: the fields of :class:`Weights` that name what it changes; empty for any parameters.  It needs one of them
    to name something.  ``suppressions``: what it has trained on the way, for the plan.
    """

    change: Callable[[Weights], Mapping[str, Tensor]]
    reads: tuple[Reader, ...] = ()
    suppressions: Sequence[Suppression] = ()


def option(help: str, default: Any, **limits: float) -> Any:
    """A field of a method's options.  ``limits``: ``above``, ``at_least``, ``at_most``, for numbers.

    ``path=True``: it names a file or folder.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def reference_option(role: str) -> Any:
    """The field of a method that compares its forget prompts with others: :meth:`Concept.reference`'s ``kind``."""
    return option(f"{role}: the empty prompt, or the prompt without the concept", "empty")


@dataclasses.dataclass(frozen=True)
class Defaults:
    """A method's settings for a family of models, used where the user says nothing.

    ``steps`` is the upper bound: training ends earlier where the residual on held-out rows reaches ``stop_residual``,
    which 0 leaves out.  ``mask_density`` is the share of the trainable elements that a saliency mask lets change, None
    without a mask.
    ``options``: an object of the method's own options, None where their own defaults hold.
    ``trajectory_steps`` are the sampler's: a trajectory has a row at each of its points.
    """

    steps: int
    learning_rate: float
    micro_batch_size: int
    trajectories: int
    trainable: str
    lr_scheduler: str = "constant"
    retain_weight: float = 1.0
    mask_density: float | None = None
    options: Any = None
    stop_residual: float = 0.0
    trajectory_steps: int = 50


def _no_pictures(folder: str) -> Mapping[str, Path]:
    raise RuntimeError("a concept without a model reads no folder")


@dataclasses.dataclass(frozen=True)
class Places:
    """Positions among a prompt's text states.

    ``named``: of the words that name a concept; of all its words where it names none.  ``end``: the first behind them.
    """

    named: tuple[int, ...]
    end: int


def _no_places(prompt: str, names: Sequence[str]) -> Places:
    raise RuntimeError("a concept without a model cannot read prompts")


def _no_encoder(prompts: Sequence[str]) -> Mapping[str, Tensor]:
    raise RuntimeError("a concept without a model cannot encode prompts")


@dataclasses.dataclass(frozen=True)
class Concept:
    """What a method is told: prompts that show the concept, what each becomes, and prompts to keep.

    ``anchor`` takes the concept's place and ``anchors`` maps every forget prompt to the prompt with it; None and empty
    where the method needs no anchor and the user names none.  ``without`` maps every forget prompt to itself without
    the concept's words; to :data:`UNCONDITIONAL` where nothing else, or nothing of the concept, is in it.
    ``encode``: N prompts -> the denoiser's conditions, by argument, (N, ...) float32, for methods that compute with
    embeddings.  ``concepts``: what is to be forgotten.
    ``pictures``: a folder -> its image files by name; raises UserError for one that holds none.
    ``places``: a prompt and names of concepts -> where these stand among its states.
    ``is_guided``: whether images are made of the unconditional prediction too; not those of a distilled model.
    """

    anchor: str | None
    forget_prompts: tuple[str, ...]
    anchors: Mapping[str, str]
    retain_prompts: tuple[str, ...]
    settings: Defaults
    encode: Callable[[Sequence[str]], Mapping[str, Tensor]] = dataclasses.field(default=_no_encoder, compare=False)
    concepts: tuple[str, ...] = ()
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: Callable[[str], Mapping[str, Path]] = dataclasses.field(default=_no_pictures, compare=False)
    places: Callable[[str, Sequence[str]], Places] = dataclasses.field(default=_no_places, compare=False)
    is_guided: bool = True

    def reference(self, prompt: str, kind: Literal["empty", "without"]) -> str:
        """What a forget prompt is compared with: the empty prompt, or itself without the concept's words."""
        return self.without[prompt] if kind == "without" else UNCONDITIONAL

    @property
    def options(self) -> Any:
        """The method's own options."""
        return self.settings.options


_BESIDE = 4  # prompts to keep for each one that the unconditional is held at


def rows_to_keep(concept: Concept) -> list[Row]:
    """Rows that hold what the teacher predicts: for the prompts to keep, and for the unconditional beside them.

    Guidance makes every image of ``(1 - s) S(unconditional) + s S(prompt)``, so what moves the unconditional moves all
    images, also where the prompt is held.  Hence it is held on the trajectories of every fourth prompt to keep, on as
    many of the concept's at most, and on half as many of its own; not at all where guidance needs no such prediction.
    """
    kept = concept.retain_prompts
    share = -(-len(kept) // _BESIDE) if concept.is_guided else 0
    beside = [*_spread(kept, share), *_spread(concept.forget_prompts, share), *[UNCONDITIONAL] * -(-share // 2)]
    rows = [Row("retain", prompt, prompt, {prompt: 1.0}) for prompt in kept]
    return rows + [Row("retain", prompt, UNCONDITIONAL, {UNCONDITIONAL: 1.0}) for prompt in beside]


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the prompts, evenly over them."""
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]
