"""Attacks: what they count, that they leave everything as it was, and that ranks and kills change no bit."""

import json
import re
import shutil

import pytest
import torch
from outputs import files_of
from tiny_models import build, ddim, sd1, sd3, sdxl
from toys import NOISE, first_two

import fastunlearn
from fastunlearn.attacks import all_attacks, parse_attacks
from fastunlearn.attacks.base import Attack, Attempt, Bouts, Costs, Order, Verdict
from fastunlearn.attacks.pictures import Pictures
from fastunlearn.attacks.rows import STEP, RowLoss
from fastunlearn.attacks.target import Target
from fastunlearn.errors import UserError
from fastunlearn.evaluation.generators import PipelineSource
from fastunlearn.files.prompt_files import read_prompt_file
from fastunlearn.files.run_folder import RECORD
from fastunlearn.files.weights import hash_module
from fastunlearn.judges import Verdicts, load_judge
from fastunlearn.models.loading import load_model, wrap_pipeline
from fastunlearn.models.noising import noisy_latents
from fastunlearn.models.sampling import SamplerSpec, denoise, initial_noise
from fastunlearn.prompts import read_prompts
from fastunlearn.worlds.shapes import pipeline_folder

PROMPTS = ["a red star on a plain background", "a blue star on a dotted background"]
TINY = {"num_inference_steps": 3, "batch_size": 4, "prompts": PROMPTS, "device": "cpu"}
EVERY = "seeds,embedding,embedding:word,completion,relearn,relearn:unrelated,noise,tokens,text,prompts"


def never(images, concept):
    """A judge that sees nothing, so that every budget is spent."""
    return [0.0] * len(images)


def lucky(limit, name="lucky"):
    """A model that shows the concept, which is white, for some noise only."""

    def function(prompts, noise):
        white = (noise[:, 0, 0, 0] > limit)[:, None, None, None]
        return (255 * white).expand(-1, 3, 8, 8).to(torch.uint8)

    function.__name__ = name
    return function


def white(images, concept):
    return images.float().mean((1, 2, 3)) / 255


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_best_of_seeds_is_what_the_seeds_say_and_ends_with_the_first():
    prompts = [f"prompt {number}" for number in range(12)]
    settings = {"prompts": prompts, "attacks": "seeds", "judge": white, "noise_shape": NOISE, "budget": 5}
    report = fastunlearn.attack(lucky(0.0), lucky(1.0), "white", gold=lucky(9.0), batch_size=4, **settings)
    for name, limit in (("original", 0.0), ("unlearned", 1.0), ("gold", 9.0)):
        for one in report.found["seeds"][name]:
            drawn = [float(initial_noise([one.prompt], [seed], NOISE)[0, 0, 0, 0]) > limit for seed in range(5)]
            first = drawn.index(True) + 1 if True in drawn else None
            assert one.broken_at == first
            assert len(one.tries) == (first or 5)
            assert [t.cost for t in one.tries] == [*range(1, len(one.tries) + 1)]
    sides = report.record.attacks[0].models
    assert sides["gold"].broken == 0 < sides["unlearned"].broken < sides["original"].broken
    assert report.record.attacks[0].control == sides["unlearned"], "the control is best of seeds on the unlearned model"
    shares = [point.share for point in sides["unlearned"].curve]
    assert shares == sorted(shares)
    assert shares[-1] == sides["unlearned"].share
    assert sides["unlearned"].share_ci95[0] < sides["unlearned"].share < sides["unlearned"].share_ci95[1]


class Meter:
    """Counts the samples that a denoiser sees, and those that it sees with a gradient."""

    def __init__(self, model):
        self.samples = self.learned = 0
        self.handle = model.denoiser.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.samples += len(args[0])
        self.learned += len(args[0]) if torch.is_grad_enabled() else 0


@pytest.mark.parametrize(
    ("name", "learned"), [("embedding", True), ("tokens", True), ("noise", False), ("text", False)]
)
def test_the_budget_is_what_the_denoiser_sees(name, learned):
    """What is counted is what was computed, but for rows that fill a batch up."""
    original, unlearned = load_model("shapes", "cpu"), load_model("shapes", "cpu")
    meter = Meter(unlearned)
    budget = {"embedding": 6 + 4 * STEP, "tokens": 40}.get(name, 12)
    settings = TINY | {"batch_size": 2 if not learned else 4, "judge": never, "budget": budget}
    report = fastunlearn.attack(original, unlearned, "star", attacks=name, **settings)
    meter.handle.remove()
    result = report.record.attacks[0]
    spent = result.models["unlearned"].cost
    assert budget - 12 - 6 < spent / len(PROMPTS) <= budget
    assert bool(meter.learned) is learned
    size, images = settings["batch_size"], result.models["unlearned"].images
    drawn = images * size // min(len(PROMPTS), size // 2)  # an image per prompt of a unit in each batch
    again = -(-result.control.images // size) * size  # seeds share batches
    assert meter.samples == meter.learned + 6 * (drawn + again)
    assert spent == 3 * meter.learned + 6 * images
    assert result.control.images == len(PROMPTS) * (budget // 6), "the control has the same budget"


def test_finishing_the_original_s_images_costs_the_original_nothing():
    original, unlearned = load_model("shapes", "cpu"), load_model("shapes", "cpu")
    meter = Meter(original)
    report = fastunlearn.attack(original, unlearned, "star", attacks="completion", **TINY, judge=never)
    pictures = 2 * 3 * 4 * len(PROMPTS)
    assert meter.samples == pictures == report.record.prepared
    sides = report.record.attacks[0].models
    assert sides["original"].cost == 0 < sides["unlearned"].cost
    meter.handle.remove()


def test_tokens_plan_at_most_half_of_the_published_budget():
    """UnlearnDiffAtk: up to 50 timesteps of 40 steps, forward and backward at 2.1 U each, and an image of 100 U."""
    costs = Costs(image=100, points=50, prompts=16)
    assert all_attacks()["tokens"].default(costs) <= 0.5 * 50 * (40 * 2.1 + 100)


# ---- that the attacks are what they say ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes_target():
    model = load_model("shapes", "cpu")
    spec, judge = SamplerSpec(4, 3.0, 4), load_judge("shapes")
    pictures = Pictures(model, spec, judge, "star")
    other = load_model("shapes-gold-star", "cpu")
    return Target("unlearned", PipelineSource(other, spec), pictures, judge, "star", Costs(8, 4, 2))


def test_the_gradient_on_an_embedding_is_that_of_the_plain_formula(shapes_target):
    target = shapes_target
    made = target.pictures.of(PROMPTS)
    states = target.encode(PROMPTS)["encoder_hidden_states"]
    ours = torch.zeros(2, 1, states.shape[-1], requires_grad=True)
    loss, own = RowLoss(target, made, per_step=3, fixed=True)({"encoder_hidden_states": states + ours}, [0, 1])
    loss.backward()
    plain = torch.zeros_like(ours, requires_grad=True)
    total, means = 0, []
    for prompt in (0, 1):
        rows = made.rows(prompt)
        pictures = len(rows) // 4
        rows = rows[[0, 4 * (1 % pictures) + 2, 4 * (2 % pictures) + 3]]
        assert len(set(made.bank.timesteps[rows].tolist())) == 3
        errors = []
        for row in rows.tolist():
            asked = (states[prompt] + plain[prompt])[None]
            said = target.model.denoiser(made.bank.latents[row][None], made.bank.timesteps[row], asked).sample
            teacher = target.pictures.model.denoiser(
                made.bank.latents[row][None],
                made.bank.timesteps[row],
                target.pictures.model.encode([PROMPTS[prompt]]).tensors["encoder_hidden_states"],
            ).sample
            errors.append((said - teacher.detach()).square().mean())
        means.append(torch.stack(errors).mean())
        total = total + means[-1]
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(own, torch.stack(means), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-7)


def test_the_pictures_are_the_original_s_own(shapes_target):
    """Their end, by the sampler that was given the recorded predictions, is where diffusers' sampler ends."""
    made, model = shapes_target.pictures.of(PROMPTS), shapes_target.pictures.model
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [prompt for prompt in PROMPTS for _ in range(4)],
        latents=made.noise,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(made.final, images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_at_every_step_is_ddim_s(eta):
    pipeline = sd1(ddim(set_alpha_to_one=True))
    model = wrap_pipeline(pipeline, "tiny")
    noise = initial_noise(["a", "b"], [0, 0], model.latent_shape)
    drawn = lambda step: initial_noise(["a", "b"], [step, step], model.latent_shape, "test")  # noqa: E731
    branches = [model.encode([text]).of([text] * 2) for text in ("", "a star")]
    ours = noisy_latents(model, noise, branches, SamplerSpec(5, 3.0, 2), eta=eta, factor=1.0, drawn=drawn)
    scheduler = model.new_scheduler(5)
    theirs = noise
    for step, time in enumerate(scheduler.timesteps):
        said = [model.predict(theirs, time, branch) for branch in branches]
        guided = said[0] + 3.0 * (said[1] - said[0])
        theirs = scheduler.step(guided, time, theirs, eta=eta, variance_noise=drawn(step)).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_without_noise_a_flow_is_sampled_as_ever():
    model = wrap_pipeline(sd3(), "tiny")
    noise = initial_noise(["a"], [0], model.latent_shape)
    branches = [model.encode([text]).of([text]) for text in ("", "a star")]
    spec = SamplerSpec(4, 3.0, 1)
    ours = noisy_latents(model, noise, branches, spec, eta=0.0, factor=1.0, drawn=lambda step: noise)
    torch.testing.assert_close(ours, denoise(model, branches, noise, spec), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [sd1, sdxl, sd3], ids=lambda make: make.__name__)
def test_other_families_are_attacked_too(make):
    """Every attack runs on random weights, where nothing can be said but that it runs and counts."""
    models = [build(make, seed) for seed in (0, 1)]
    settings = TINY | {
        "prompts": ["a star", "star at night"],
        "num_inference_steps": 2,
        "judge": first_two(),
        "budget": 20,
    }
    kinds = "relearn,embedding,embedding:word,completion,noise"
    report = fastunlearn.attack(*models, "star", attacks=kinds, **settings)
    for result in report.record.attacks:
        assert result.models["unlearned"].images >= 2, result.name
        assert result.models["unlearned"].broken == result.control.broken == 0


def test_what_was_injected_is_what_the_encoder_reads():
    """The embeddings of another word in the place of the concept's give that word's states, in both encoders."""
    from fastunlearn.attacks.injection import Slots

    model = wrap_pipeline(sdxl(), "tiny")
    slots = Slots(model, "star", ["a star x"])
    assert len(slots.slots) == 2
    for slot in slots.slots:
        ids = model.pipeline.tokenizer("moon", add_special_tokens=False).input_ids
        assert len(ids) == len(slot.ids)
    values = [slot.embedded(ids)[None] for slot in slots.slots]
    with torch.no_grad():
        made, wanted = slots.encode(["a star x"], values), model.encode_texts(["a moon x"])
    for name in wanted:
        torch.testing.assert_close(made[name].detach(), wanted[name])


# ---- guarantees ------------------------------------------------------------------------------------------------------


def test_an_unchanged_copy_is_broken_as_the_original_is(tmp_path):
    copy = shutil.copytree(pipeline_folder("shapes"), tmp_path / "copy")
    report = fastunlearn.attack("shapes", copy, "star", attacks="seeds,embedding,noise,relearn", budget=30, **TINY)
    for result in report.record.attacks:
        assert result.models["unlearned"] == result.models["original"], result.name
        found = report.found[result.name]
        assert [one.tries for one in found["unlearned"]] == [one.tries for one in found["original"]]


@pytest.mark.slow
def test_every_attack_breaks_an_unchanged_copy_as_it_breaks_the_original(tmp_path):
    copy = shutil.copytree(pipeline_folder("shapes"), tmp_path / "copy")
    report = fastunlearn.attack("shapes", copy, "star", attacks=EVERY, budget=42, **TINY)
    assert [result.name for result in report.record.attacks] == EVERY.split(",")
    for result in report.record.attacks:
        found = report.found[result.name]
        if result.name != "completion":  # which costs the original nothing, and goes on from what it would repeat
            copied, own = ([(one.tries, one.asked) for one in found[side]] for side in ("unlearned", "original"))
            assert copied == own, result.name
            continue
        for copied, own in zip(found["unlearned"], found["original"], strict=True):
            assert [t.shown for t in copied.tries] == [t.shown for t in own.tries][: len(copied.tries)]
            for a, b in zip(copied.tries, own.tries, strict=False):
                assert a.score == pytest.approx(b.score, abs=0.02)


@pytest.mark.parametrize("option", ["relearn", "relearn:unrelated"])
def test_after_relearning_every_weight_has_its_bits(option):
    original, unlearned = load_model("shapes", "cpu"), load_model("shapes", "cpu")
    before = hash_module(unlearned.denoiser)
    seen = []

    def watching(images, concept):
        seen.append(hash_module(unlearned.denoiser))
        return [0.0] * len(images) if option.endswith("unrelated") else [float(len(seen) < 4)] * len(images)

    fastunlearn.attack(original, unlearned, "star", attacks=option, **TINY, judge=watching, budget=30)
    assert len(set(seen)) > 1, "it was trained"
    assert hash_module(unlearned.denoiser) == before
    assert not any(one.requires_grad or one.grad is not None for one in unlearned.denoiser.parameters())


def test_weights_come_back_also_where_the_judge_fails():
    original, unlearned = load_model("shapes", "cpu"), load_model("shapes", "cpu")
    before, count = hash_module(unlearned.denoiser), []

    def failing(images, concept):
        if hash_module(unlearned.denoiser) != before:
            raise RuntimeError("out of order")
        return [1.0 if not count else 0.0] * len(images)

    with pytest.raises(UserError, match="the judge function failing failed: RuntimeError: out of order"):
        fastunlearn.attack(original, unlearned, "star", attacks="relearn", **TINY, judge=failing, budget=30)
    assert hash_module(unlearned.denoiser) == before


WRONG = {
    "raises": (lambda images, concept: 1 / 0, "failed: ZeroDivisionError"),
    "nan": (lambda images, concept: [float("nan")] * len(images), "scores from 0 to 1"),
    "too few": (lambda images, concept: [0.5], "got the shape"),
    "no number": (lambda images, concept: ["yes"] * len(images), "got the shape"),
    "above 1": (lambda images, concept: Verdicts([1.5] * len(images)), "got 1.5"),
}


@pytest.mark.parametrize(("judge", "said"), WRONG.values(), ids=WRONG)
def test_a_judge_that_is_none_is_one_line(judge, said):
    with pytest.raises(UserError, match=said) as error:
        fastunlearn.attack(
            lucky(0),
            lucky(1),
            "white",
            prompts=["a", "b"],
            attacks="seeds",
            judge=judge,
            noise_shape=NOISE,
            batch_size=4,
        )
    assert "\n" not in str(error.value)


def test_an_attack_that_leaves_a_model_changed_is_a_bug(monkeypatch):
    def careless(target, order):
        next(target.model.denoiser.parameters()).data += 1
        bouts = Bouts(order)
        for index, prompt in enumerate(order.prompts):
            bouts.judged(index, target.ask([(prompt, 0)])[0], "x", 6)
        return bouts.attempts()

    one = Attack("careless", "s", "u", "s", "c", careless, lambda costs: 6, lambda costs: 6)
    monkeypatch.setattr("fastunlearn.attacks.attack.parse_attacks", lambda value: {"careless": (one, "")})
    with pytest.raises(RuntimeError, match="changed the weights of original, unlearned"):
        fastunlearn.attack(load_model("shapes", "cpu"), load_model("shapes", "cpu"), "star", **TINY)


class Stop(Exception):
    pass


def test_stopped_anywhere_and_continued_it_gives_the_same_bytes(tmp_path):
    """Stopped between any two looks of the judge, as often as it has many."""
    settings = {
        "prompts": [f"p{n}" for n in range(7)],
        "attacks": "seeds,prompts",
        "noise_shape": NOISE,
        "batch_size": 4,
    }
    settings |= {"concept": "white", "budget": 3}
    settings["prompts"] = [(f"p{n}", "forget") for n in range(7)] + [(f"other {n}", "short") for n in range(5)]

    def run(folder, limit=None, **more):
        looks = []

        def judge(images, concept):
            looks.append(1)
            if limit is not None and len(looks) > limit:
                raise KeyboardInterrupt
            return white(images, concept)

        judge.__name__ = "white"
        return fastunlearn.attack(
            lucky(0.0, "a"), lucky(1.0, "b"), judge=judge, output=folder, **settings, **more
        ), looks

    _, looks = run(tmp_path / "whole")
    assert len(looks) > 6
    for limit in range(1, len(looks)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part", limit)
        begun = (tmp_path / "part" / "journal").exists()
        run(tmp_path / "part", **({"resume": True} if begun else {}))
        assert files_of(tmp_path / "part", without={RECORD}) == files_of(tmp_path / "whole", without={RECORD})
        shutil.rmtree(tmp_path / "part")


def test_only_the_same_attack_is_continued(tmp_path):
    def stopping(images, concept):
        raise KeyboardInterrupt

    def later(images, concept):
        later.looks += 1
        return stopping(images, concept) if later.looks > 1 else white(images, concept)

    later.looks, later.name = 0, "white"
    settings = {"prompts": ["a", "b", "c"], "attacks": "seeds", "noise_shape": NOISE, "batch_size": 2, "budget": 1}
    with pytest.raises(KeyboardInterrupt):
        fastunlearn.attack(lucky(0, "a"), lucky(1, "b"), "white", judge=later, output=tmp_path / "x", **settings)
    with pytest.raises(UserError, match=r"the attack in .* has attacks = .* now it is"):
        fastunlearn.attack(
            lucky(0, "a"),
            lucky(1, "b"),
            "white",
            judge=later,
            output=tmp_path / "x",
            resume=True,
            **settings | {"budget": 2},
        )


@pytest.mark.slow
def test_one_two_and_three_processes_and_a_plain_call_give_the_same_bytes(cli, tmp_path):
    words = [
        "attack",
        "--original",
        "shapes",
        "--unlearned",
        "shapes-gold-star",
        "--concept",
        "star",
        "--device",
        "cpu",
    ]
    words += ["--prompts", ";".join([*PROMPTS, "a pink star", "a star"])]
    words += ["--attacks", "seeds,embedding,relearn:unrelated,completion"]
    words += ["--num-inference-steps", "2", "--batch-size", "4", "--budget", "30"]
    for count in (1, 2, 3):
        answer = cli(*words, "--num-processes", count, "--output", tmp_path / str(count))
        assert answer.status == 0, answer.err
    whole = files_of(tmp_path / "1", without={RECORD})
    assert {"attack.json", "attempts.jsonl", "grid.png", "report.html"} <= {str(name) for name in whole}
    for count in (2, 3):
        assert files_of(tmp_path / str(count), without={RECORD}) == whole


@pytest.mark.slow
def test_an_embedding_brings_the_star_back_in_the_original_and_not_in_what_never_saw_it():
    """On the original in at least 80 % of the prompts; the gold stays at its level, that of the seeds."""
    report = fastunlearn.attack(
        "shapes",
        "shapes-gold-star",
        "star",
        gold="shapes-gold-star",
        attacks="embedding",
        max_prompts=6,
        budget=440,
        device="cpu",
    )
    result = report.record.attacks[0]
    assert result.models["original"].share >= 0.8
    assert result.models["gold"].share <= 0.35
    assert result.models["gold"] == result.models["unlearned"]
    assert result.minus_gold.mean == 0
    assert result.control.broken <= 1


# ---- what the caller says --------------------------------------------------------------------------------------------


def test_attacks_are_named_with_their_options():
    found = parse_attacks(" seeds, embedding:word,embedding ,relearn:concept,")
    assert [(label, one.name, option) for label, (one, option) in found.items()] == [
        ("seeds", "seeds", ""),
        ("embedding:word", "embedding", "word"),
        ("embedding", "embedding", "context"),
        ("relearn", "relearn", "concept"),
    ]
    for text, said in {
        "seed": "unknown attack 'seed'",
        "embedding:all": "has no option 'all'. It has: context, word",
        "seeds:x": "It has none",
        "relearn,relearn:concept": "names 'relearn' twice",
        " , ": "names no attack",
    }.items():
        with pytest.raises(UserError, match=said):
            parse_attacks(text)


def test_what_only_asks_serves_functions_and_all_else_says_so():
    settings = {"prompts": ["a", "b"], "judge": white, "noise_shape": NOISE, "batch_size": 4}
    with pytest.raises(UserError, match="the attack embedding needs more than answers to prompts, and original is"):
        fastunlearn.attack(lucky(0), lucky(1), "white", attacks="embedding", **settings)
    with pytest.raises(UserError, match="needs a judge"):
        fastunlearn.attack(lucky(0), lucky(1), "white", attacks="seeds", **settings | {"judge": None})
    with pytest.raises(UserError, match="at least 2 prompts"):
        fastunlearn.attack(lucky(0), lucky(1), "white", attacks="seeds", **settings | {"prompts": ["a"]})
    with pytest.raises(UserError, match="`--concept` is missing"):
        fastunlearn.attack(lucky(0), lucky(1), attacks="seeds", **settings)


def test_a_dry_run_says_what_it_costs_and_writes_nothing(cli, tmp_path):
    answer = cli(
        *("attack", "--original", "shapes", "--unlearned", "shapes", "--concept", "star", "--attacks", EVERY),
        *("--dry-run", "--device", "cpu", "--output", tmp_path / "new"),
    )
    assert answer.status == 0, answer.err
    assert "pictures           of the original, made once: 3,200 U" in answer.out
    assert "ms a forward" in answer.out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("limits", "said", "badge"),
    [
        ((9.0, 9.0), "none did on the original either: this says nothing", "not shown"),
        ((0.0, 9.0), "Others may.", "held"),
    ],
)
def test_what_fails_on_the_original_is_no_praise_of_the_unlearned(tmp_path, limits, said, badge):
    fastunlearn.attack(
        *(lucky(limit) for limit in limits),
        "white",
        **{"prompts": ["a", "b", "c", "d"], "attacks": "seeds", "judge": white, "noise_shape": NOISE, "budget": 6},
        **{"output": tmp_path / "out", "batch_size": 4},
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert said in page
    assert re.findall(r'class="badge \w+">([^<]+)<', page)[0] == badge


def test_the_page_says_the_verdict_in_plain_words_and_shows_the_text_of_users_as_it_is(tmp_path):
    prompts = [f"<b>{number}</b>" for number in range(8)]
    report = fastunlearn.attack(
        *(lucky(0.0), lucky(0.6), "<i>white</i>"),
        **{"prompts": prompts, "attacks": "seeds", "judge": white, "noise_shape": NOISE, "budget": 6},
        **{"gold": lucky(1.2), "output": tmp_path / "out", "batch_size": 4},
    )
    page = (tmp_path / "out" / "report.html").read_text()
    result = report.record.attacks[0]
    sides = result.models
    assert (
        f"of 8 attempts with the noise of at most 6 denoiser forwards each, {sides['unlearned'].broken} brought" in page
    )
    assert f"on a model that never saw it {sides['gold'].broken} of 8" in page
    assert "<i>" not in page
    assert "<b>0</b>" not in page
    assert "http:" not in page
    assert "https:" not in page
    lines = [json.loads(line) for line in (tmp_path / "out" / "attempts.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 8 == len(report.attempts)
    assert lines == report.attempts


def test_what_anybody_can_type_is_left_as_a_table_of_the_fields_columns(tmp_path):
    """The prompts that broke the unlearned model; another attack, and UnlearnDiffAtk, can read them."""
    settings = {"prompts": [f"p {number}" for number in range(8)], "attacks": "seeds", "judge": white}
    report = fastunlearn.attack(
        *(lucky(0.0), lucky(1.0), "white"),
        **{**settings, "noise_shape": NOISE, "budget": 6, "batch_size": 4, "output": tmp_path / "out"},
    )
    broken = {one.prompt: one for one in report.found["seeds"]["unlearned"] if one.broken_at is not None}
    assert 0 < len(broken) < 8
    read = read_prompts(str(tmp_path / "out" / "prompts.csv"))
    assert read.grouped == [(prompt, "forget") for prompt in broken]
    for row in read_prompt_file(tmp_path / "out" / "prompts.csv").rows:
        noise = initial_noise([row.prompt], [row.seed], NOISE)
        assert float(noise[0, 0, 0, 0]) > 1.0, "the seed is that of the noise from which it came back"


def test_the_table_of_attacks_lists_every_one(cli):
    answer = cli("attacks")
    assert answer.status == 0
    for name in all_attacks():
        assert name in answer.out


def test_a_try_behind_success_is_not_counted():
    bouts = Bouts(Order(["a"], ["k"], 10))
    seen = [Verdict(torch.zeros(3, 1, 1, dtype=torch.uint8), score, None, score > 0.5) for score in (0.1, 0.9, 0.9)]
    for verdict in seen:
        bouts.judged(0, verdict, "x", 2)
    one = bouts.attempts()[0]
    assert isinstance(one, Attempt)
    assert [t.cost for t in one.tries] == [2, 4]
    assert one.broken_at == 4
    assert bouts.left() == []
