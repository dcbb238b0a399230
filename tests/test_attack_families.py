"""Attacks on families whose text encoders are T5 or language models: the gradient, what runs, and what is refused."""

import pytest
import torch
from tiny_models import auraflow, build, flux, lumina2, pixart, qwen_image, sana, sd3, z_image
from toys import first_two

import fastunlearn
from fastunlearn.attacks.base import Costs
from fastunlearn.attacks.injection import Slots, _spelt
from fastunlearn.attacks.pictures import Pictures
from fastunlearn.attacks.rows import RowLoss
from fastunlearn.attacks.target import Target
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.files.weights import hash_module
from fastunlearn.judges import as_judge
from fastunlearn.methods.recipe import STATES
from fastunlearn.models.loading import wrap_pipeline
from fastunlearn.models.sampling import SamplerSpec

PROMPTS = ["a star", "star at night"]
FAMILIES = {
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "lumina2": lumina2,
    "auraflow": auraflow,
    "qwen-image": qwen_image,
    "z-image": z_image,
}
FAST = ("pixart", "z-image")
EVERY = ("embedding", "embedding:word", "tokens", "text", "relearn", "completion", "noise")
#: What a family's tiny pipeline cannot serve, and what the one line says.
#: No tiny tokenizer of these has words of one token, and FLUX's words are CLIP's, its states T5's.
REFUSED = {
    (family, kind): "has no whole words to choose from"
    for family in ("pixart", "sana", "lumina2", "auraflow", "qwen-image", "z-image")
    for kind in ("tokens", "text")
}
REFUSED["flux", "text"] = "gives its denoiser no states"

families = pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)


def networks_of(pipeline):
    return {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}


def state_of(pipeline):
    """Everything that an attack must leave as it was: bits, modes, what trains, gradients, hooks."""
    state = {}
    for name, network in networks_of(pipeline).items():
        state[name] = hash_module(network)
        for path, module in network.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            state[name, path] = module.training, *map(len, hooks)
        for path, one in network.named_parameters():
            state[name, path, "parameter"] = one.requires_grad, one.grad is None
    return state


@families
def test_the_gradient_reaches_the_condition_and_is_the_slope(family):
    original, other = (wrap_pipeline(build(FAMILIES[family], seed), family) for seed in (0, 1))
    spec, judge = SamplerSpec(3, 3.0, 4), as_judge(first_two())
    target = Target(
        "unlearned", PipelineSource(other, spec), Pictures(original, spec, judge, "star"), judge, "star", Costs(6, 3, 2)
    )
    conditions = target.encode(PROMPTS)
    offset = torch.zeros(2, 1, conditions[STATES].shape[-1], requires_grad=True)

    def loss(offset):
        rows = RowLoss(target, target.pictures.of(PROMPTS), per_step=2, fixed=True)
        return rows(conditions | {STATES: conditions[STATES] + offset}, [0, 1])[0]

    loss(offset).backward()
    slopes = offset.grad.flatten(1).norm(dim=1)
    assert offset.grad.isfinite().all()
    assert (slopes > 0).all(), "of every prompt"
    size = conditions[STATES].square().mean().sqrt() / slopes.max()
    risen = []
    for share in (0.2, 0.02, 2e-3, 2e-4, 2e-5):  # one is small enough for the steepest, and not lost in rounding
        step = share * size
        with torch.no_grad():
            rise = loss(step * offset.grad) - loss(-step * offset.grad)
        risen.append(float(rise / (2 * step * offset.grad.square().sum())))
    assert any(one == pytest.approx(1, rel=0.1) for one in risen), risen


@families
def test_what_is_injected_is_what_the_encoders_read(family):
    """The embeddings of another word in the place of the concept's give that word's states, whatever the encoder does
    with its tokens: T5 keeps its layer elsewhere, Gemma scales, Qwen reads a template around the prompt."""
    model = wrap_pipeline(build(FAMILIES[family]), family)
    prompts, others = ["a star x", "red star"], ["a moon x", "red moon"]
    slots = Slots(model, "star", prompts)
    values = []
    for slot in slots.slots:
        tokenizer = next(
            getattr(model.pipeline, f"tokenizer{part}")
            for part in ("", "_2", "_3")
            if slot.layer in (getattr(model.pipeline, f"text_encoder{part}", None) or torch.nn.Module()).modules()
        )
        spelt = [ids for ids in _spelt(tokenizer, "moon") if len(ids) == len(slot.ids)]
        starts = [ids for ids in _spelt(tokenizer, "star") if len(ids) == len(slot.ids)]
        values.append(slot.embedded(spelt[starts.index(slot.ids)]).expand(2, -1, -1))
    made, wanted = slots.encode(prompts, values), model.encode_texts(others)
    for name in wanted:
        torch.testing.assert_close(made[name].detach(), wanted[name])
    assert not torch.equal(wanted[STATES], model.encode_texts(prompts)[STATES])


def test_a_word_that_is_read_as_other_tokens_in_some_prompts_is_one_line():
    model = build(auraflow)
    with pytest.raises(UserError, match="as other tokens in some than in others") as error:
        fastunlearn.attack(
            *(model, build(auraflow, 1), "star"),
            **{"attacks": "embedding:word", "judge": first_two(), "prompts": ["a STAR x", "a star x"]},
            **{"num_inference_steps": 2, "batch_size": 4, "device": "cpu", "budget": 24},
        )
    assert "\n" not in str(error.value)


@families
def test_attacks_run_or_are_refused_in_one_line_and_leave_everything_as_it_was(family):
    models = [build(FAMILIES[family], seed) for seed in (0, 1)]
    settings = {"prompts": PROMPTS, "num_inference_steps": 2, "batch_size": 4, "device": "cpu", "budget": 24}
    fastunlearn.attack(*models, "star", attacks="seeds", judge=first_two(), **settings | {"budget": 4})
    before = [state_of(one) for one in models]  # as they are once they are loaded
    serve = [kind for kind in EVERY if (family, kind) not in REFUSED]
    report = fastunlearn.attack(*models, "star", attacks=serve, judge=first_two(), **settings)
    for result in report.record.attacks:
        assert result.models["unlearned"].images >= 2, result.name
        assert result.models["unlearned"].cost <= 2 * 24
    for kind in set(EVERY) - set(serve):
        with pytest.raises(UserError, match=REFUSED[family, kind]) as error:
            fastunlearn.attack(*models, "star", attacks=kind, judge=first_two(), **settings)
        assert "\n" not in str(error.value)
        assert "Leave" in str(error.value)
    assert [state_of(one) for one in models] == before
