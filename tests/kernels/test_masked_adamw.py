"""MaskedAdamW against AdamW in float64: selected elements step, the others keep their bits."""

import copy
import io
import pickle

import pytest
import torch
from fastunlearn_kernels import MaskedAdamW, pack_bits, unpack_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("took")  # on each backend

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# one element, less than a byte, 63, several blocks with an odd end, exactly one block
SHAPES = [(1,), (5,), (7, 9), (25, 60), (32, 32)]
MODES = ["dense", "select", "compact"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(shapes=SHAPES, dtype=torch.float32, mode="select", density=0.5, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]
    masks = [torch.rand(shape, generator=g) < (1.1 if mode == "dense" else density) for shape in shapes]
    packed = {} if mode == "dense" else {p: pack_bits(m) for p, m in zip(params, masks, strict=True)}
    optimizer = MaskedAdamW(params, **{**OPTIONS, **options}, grad_masks=packed, compact=mode == "compact")
    return params, masks, optimizer


def give_gradients(params, step, poison=None):
    """Gradients of every size; NaN where ``poison`` masks say that nothing may be read."""
    g = torch.Generator().manual_seed(1000 + step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=g) * 10.0 ** (step - 1)
        param.grad = gradient.to(param.dtype)
        if poison is not None:
            param.grad = torch.where(poison[i], float("nan"), param.grad)


class Oracle:
    """AdamW as its authors write it, in float64, on the values that the parameters start from."""

    def __init__(self, params, **options):
        self.options = {**OPTIONS, **options}
        self.weights = [param.detach().double().clone() for param in params]
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]
        self.steps = 0

    def step(self, gradients):
        self.steps += 1
        lr, (beta1, beta2) = self.options["lr"], self.options["betas"]
        for i, gradient in enumerate(gradients):
            g = gradient.double()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g * g
            m_hat = self.m[i] / (1 - beta1**self.steps)
            v_hat = self.v[i] / (1 - beta2**self.steps)
            decayed = self.weights[i] * (1 - lr * self.options["weight_decay"])
            self.weights[i] = decayed - lr * m_hat / (v_hat.sqrt() + self.options["eps"])


def assert_steps_like_the_oracle(params, masks, optimizer, num_steps=3, **step_options):
    before = [param.detach().clone() for param in params]
    oracle = Oracle(params)
    for step in range(num_steps):
        give_gradients(params, step)
        oracle.step([param.grad for param in params])
        give_gradients(params, step, poison=[~mask for mask in masks])
        optimizer.step(**step_options)
    for param, start, mask, expected in zip(params, before, masks, oracle.weights, strict=True):
        assert torch.equal(param[~mask], start[~mask])
        actual = param.detach().double()[mask]
        if param.dtype == torch.float32:
            torch.testing.assert_close(actual, expected[mask], rtol=2e-6, atol=2e-6)
        else:  # one rounding, at the end: the master does not lose the small steps
            ulp = 2**-10 if param.dtype == torch.float16 else 2**-7
            torch.testing.assert_close(actual, expected[mask], rtol=ulp, atol=2e-6)
        if mask.any() and param.dtype != torch.float32:
            master = optimizer.state[param]["master"]
            master = master if optimizer.compact and optimizer.grad_mask(param) is not None else master[mask]
            torch.testing.assert_close(master.double(), expected[mask], rtol=2e-6, atol=2e-6)
    return oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_selected_elements_step_and_others_keep_their_bits(mode, dtype, took):
    params, masks, optimizer = make(dtype=dtype, mode=mode)
    assert_steps_like_the_oracle(params, masks, optimizer)
    reference = "fused_adamw_" if (mode, dtype) == ("dense", torch.float32) else "masked_adamw_"
    took("_masked_adamw_kernel", reference)
    took("_advance_step_kernel", reference)


def test_it_is_torch_adamw_where_nothing_is_masked():
    params, _, optimizer = make(mode="dense")
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    torch_adamw = torch.optim.AdamW(twins, **OPTIONS)
    for step in range(4):
        give_gradients(params, step)
        give_gradients(twins, step)
        optimizer.step()
        torch_adamw.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_states_of_unselected_elements_are_not_written():
    params, masks, optimizer = make(mode="select")
    give_gradients(params, 1)
    optimizer.step()
    for param, mask in zip(params, masks, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[param][name] if param in optimizer.state else torch.zeros_like(param)
            state[~mask] = -7.25  # nobody reads or changes it
    give_gradients(params, 2, poison=[~mask for mask in masks])
    optimizer.step()
    for param, mask in zip(params, masks, strict=True):
        if param in optimizer.state:
            assert (optimizer.state[param]["exp_avg"][~mask] == -7.25).all()
            assert not optimizer.state[param]["exp_avg"].isnan().any()


@pytest.mark.parametrize("mode", ["select", "compact"])
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_densities(mode, density):
    params, masks, optimizer = make(mode=mode, density=density)
    assert_steps_like_the_oracle(params, masks, optimizer)
    if mode == "compact":
        for param, mask in zip(params, masks, strict=True):
            if mask.any():
                assert optimizer.state[param]["exp_avg"].numel() == int(mask.sum())
            else:
                assert param not in optimizer.state


@pytest.mark.parametrize("mode", MODES)
def test_memory_formats(mode):
    params, masks, optimizer = make([(8, 5, 3, 3)], mode=mode)
    g = torch.Generator().manual_seed(0)
    laid_out = torch.nn.Parameter(torch.randn(8, 5, 3, 3, generator=g).to(memory_format=torch.channels_last))
    assert torch.equal(laid_out, params[0])
    packed = {} if mode == "dense" else {laid_out: pack_bits(masks[0])}
    other = MaskedAdamW([laid_out], **OPTIONS, grad_masks=packed, compact=mode == "compact")
    for step in range(2):
        give_gradients(params, step)
        laid_out.grad = params[0].grad.clone()  # laid out otherwise than its parameter
        optimizer.step()
        other.step()
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, params[0])


def test_unaligned_tensors():
    storage = torch.randn(4 * 1024 + 1)
    param = storage[1:].requires_grad_(True)
    aligned = torch.nn.Parameter(param.detach().clone())
    optimizers = [MaskedAdamW([p], **OPTIONS, compact=True) for p in (param, aligned)]
    mask = pack_bits(torch.rand(4096, generator=torch.Generator().manual_seed(0)) > 0.5)
    for p, optimizer in zip((param, aligned), optimizers, strict=True):
        optimizer.set_grad_mask(p, mask)
        give_gradients([p], 1)
        optimizer.step()
    assert torch.equal(param, aligned)


@pytest.mark.parametrize("mode", MODES)
def test_factors_from_device_memory(mode):
    params, masks, optimizer = make(mode=mode, lr=torch.tensor(OPTIONS["lr"]))
    oracle = Oracle(params)
    others = {p: torch.randn(p.shape, generator=torch.Generator().manual_seed(9)) for p in params}
    give_gradients(params, 1)
    oracle.step([0.25 * (p.grad.double() - 1.5 * others[p].double()) for p in params])
    poisoned = {p: torch.where(m, others[p], float("nan")) for p, m in zip(params, masks, strict=True)}
    optimizer.step(grad_scale=torch.tensor(0.25), other_grads=poisoned, other_coefficient=torch.tensor(-1.5))
    for param, mask, expected in zip(params, masks, oracle.weights, strict=True):
        torch.testing.assert_close(param.detach().double()[mask], expected[mask], rtol=2e-6, atol=2e-6)


def test_clip_factor_sees_selected_elements_only():
    params, masks, optimizer = make(mode="compact")
    give_gradients(params, 1, poison=[~mask for mask in masks])
    factor, norm = optimizer.clip_factor(0.5)
    expected = torch.cat([p.grad[m] for p, m in zip(params, masks, strict=True)]).double().norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(factor.double(), 0.5 / expected, rtol=1e-5, atol=0)
    assert optimizer.clip_factor(1e9)[0] == 1


def test_groups_have_their_own_options_and_are_read_afresh():
    params, masks, _ = make([(7, 9), (25, 60)])
    packed = [pack_bits(mask) for mask in masks]
    optimizer = MaskedAdamW([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], **OPTIONS, compact=True)
    # what ZeRO does: each group becomes one flat tensor, and only one group is there in a step
    flats = [param.detach().reshape(-1).clone().requires_grad_(True) for param in params]
    before = [flat.detach().clone() for flat in flats]
    for group, flat, bits in zip(optimizer.param_groups, flats, packed, strict=True):
        group["params"] = [flat]
        optimizer.set_grad_mask(flat, bits)
    groups = optimizer.param_groups
    give_gradients(flats, 1)
    for group in groups:
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups
    for flat, start, mask, lr in zip(flats, before, masks, (0.5, OPTIONS["lr"]), strict=True):
        oracle = Oracle([start], lr=lr)
        oracle.step([flat.grad])
        mask = mask.reshape(-1)
        assert torch.equal(flat[~mask], start[~mask])
        torch.testing.assert_close(flat.detach().double()[mask], oracle.weights[0][mask], rtol=2e-6, atol=2e-6)
        assert optimizer.state[flat]["step"] == 1
    for group in groups:
        group["params"] = []
    optimizer.step()  # empty groups are no error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_continues_the_run_bit_for_bit(mode, dtype):
    params, _, optimizer = make(mode=mode, dtype=dtype)
    give_gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p.clone()) for p in saved["params"]]
    other = MaskedAdamW(resumed, lr=1.0, compact=mode == "compact")
    other.load_state_dict(saved["optimizer"])
    for step in (1, 2):
        give_gradients(params, step)
        give_gradients(resumed, step)
        optimizer.step()
        other.step()
    for param, twin in zip(params, resumed, strict=True):
        assert torch.equal(param, twin)
        for name, value in optimizer.state[param].items():
            assert value.dtype == other.state[twin][name].dtype == torch.float32
            assert torch.equal(value, other.state[twin][name])
        if mode != "dense":
            assert torch.equal(optimizer.grad_mask(param), other.grad_mask(twin))


def test_copies_keep_the_masks():
    params, masks, optimizer = make(mode="compact")
    give_gradients(params, 1)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for param, mask in zip(copied.param_groups[0]["params"], masks, strict=True):
            assert torch.equal(unpack_bits(copied.grad_mask(param), mask.shape), mask)


def test_a_checkpoint_of_another_mask_or_memory_format_is_refused():
    params, _, optimizer = make([(4, 3, 3, 3)], mode="compact")
    give_gradients(params, 1)
    optimizer.step()
    saved = optimizer.state_dict()
    turned = torch.nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="memory format"):
        MaskedAdamW([turned], compact=True).load_state_dict(saved)
    without_masks = {key: value for key, value in saved.items() if key != "grad_masks"}
    with pytest.raises(ValueError, match="the mask selects 108"):
        MaskedAdamW([torch.nn.Parameter(params[0].detach())], compact=True).load_state_dict(without_masks)


def test_gradients_stay_and_runs_repeat():
    results = []
    for _ in range(2):
        params, _, optimizer = make(mode="compact", dtype=torch.bfloat16)
        give_gradients(params, 1)
        before = [param.grad.clone() for param in params]
        optimizer.step()
        assert all(torch.equal(param.grad, start) for param, start in zip(params, before, strict=True))
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_states_made_in_advance_are_those_that_the_first_step_starts_from(mode, dtype):
    ends = []
    for in_advance in (True, False):
        params, masks, optimizer = make(dtype=dtype, mode=mode)
        for param, mask in zip(params, masks, strict=True):
            if not in_advance:
                assert param not in optimizer.state
                continue
            state = optimizer.init_state(param)
            assert state is optimizer.state[param]
            shape = (int(mask.sum()),) if mode == "compact" else param.shape
            assert state["step"] == 0
            assert all(value.shape == shape for name, value in state.items() if name != "step")
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
        give_gradients(params, 1)
        optimizer.step()
        states = [optimizer.state[param] for param, mask in zip(params, masks, strict=True) if mask.any()]
        assert all(state["step"] == 1 for state in states)
        ends.append([*params, *(value for state in states for value in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_states_that_are_there_are_not_made_again():
    params, _, optimizer = make([(7, 9)], mode="compact")
    give_gradients(params, 1)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
    state = optimizer.init_state(params[0])
    assert state.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_a_mask_that_selects_nothing_has_states_all_the_same():
    param = torch.nn.Parameter(torch.ones(9))
    optimizer = MaskedAdamW([param], compact=True, grad_masks={param: pack_bits(torch.zeros(9, dtype=torch.bool))})
    assert optimizer.init_state(param)["exp_avg"].shape == (0,)


@pytest.mark.parametrize(("dtype", "per_element"), [(torch.float32, 8), (torch.bfloat16, 12)], ids=str)
def test_the_bytes_of_states_and_masks(dtype, per_element):
    n, selected = 4096, 1024
    mask = torch.arange(n) < selected
    sizes = {}
    for mode in MODES:
        param = torch.nn.Parameter(torch.zeros(n, dtype=dtype))
        masks = {} if mode == "dense" else {param: pack_bits(mask)}
        optimizer = MaskedAdamW([param], grad_masks=masks, compact=mode == "compact")
        without_states = optimizer.state_bytes()
        optimizer.init_state(param)
        sizes[mode] = (without_states, optimizer.state_bytes() - without_states)
    # the bits, the bits in memory order, and the ranks of 4 blocks; a step count of 4 bytes
    bits = 2 * n // 8 + 4 * 8
    assert sizes == {
        "dense": (0, per_element * n + 4),
        "select": (bits, per_element * n + 4),
        "compact": (bits, per_element * selected + 4),
    }


def test_parameters_without_elements_or_gradients_are_left_alone():
    empty, idle, trained = (torch.nn.Parameter(torch.ones(n)) for n in (0, 3, 3))
    optimizer = MaskedAdamW([empty, idle, trained], lr=0.1)
    empty.grad, trained.grad = torch.zeros(0), torch.ones(3)
    optimizer.step()
    assert torch.equal(idle, torch.ones(3))
    assert (trained < 1).all()


def test_a_closure_recomputes_the_gradients():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([param], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))


def check_any(shapes, dtype, mode, density, seed):
    params, masks, optimizer = make(shapes, dtype, mode, density, seed)
    assert_steps_like_the_oracle(params, masks, optimizer, num_steps=2)


ANY = {
    "shapes": st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4),
    "dtype": st.sampled_from(DTYPES),
    "mode": st.sampled_from(MODES),
    "density": st.floats(0, 1),
    "seed": st.integers(0, 10**6),
}
HYPOTHESIS = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@settings(HYPOTHESIS, max_examples=15)
@given(**ANY)
def test_any_shapes_and_masks(**inputs):
    check_any(**inputs)


@pytest.mark.slow
@settings(HYPOTHESIS, max_examples=200)
@given(**ANY)
def test_many_shapes_and_masks(**inputs):
    check_any(**inputs)
