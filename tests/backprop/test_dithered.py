"""Dithered backprop: the distribution of the rounded values, their random numbers, and what a layer makes of them."""

from math import exp, pi, sqrt
from statistics import NormalDist

import numpy as np
import pytest

import reference as ref
import sparsetrain as st
from backward_passes import KINDS, Passes, close
from quadrants import images
from sparsetrain import arrays, backprop, data, int8, nn, optim, plans, sparse_gradient, sparsify
from sparsetrain.backprop import Dithered
from sparsetrain.sparse import Parameter, SparseParameter
from sparsetrain.train import Trainer

kinds = pytest.mark.parametrize("kind", KINDS)


def rounded(dy, step, seed, limit=0):
    """dy, (N, C, H, W), rounded to multiples of step, and how many were clipped."""
    weight = Parameter(np.zeros((dy.shape[1], 1, 1, 1), dy.dtype))
    x = arrays.empty(len(dy), 1, *dy.shape[2:], dy.dtype)
    selection = backprop.dither(step, seed, limit)
    out, used = sparse_gradient.written_out(x, weight, plans.Geometry(), arrays.pack(dy), selection)
    return arrays.unpack(out), used.clipped


def levels(dx, dy, s):
    """How many steps of s deviations each value of dx is, which must be whole numbers."""
    step = dy.dtype.type(s * dy.std(dtype=np.float64))
    found = np.rint(dx / step)
    np.testing.assert_allclose(dx, found * step, rtol=1e-5, atol=0)
    return found


# ---- the rounded values


@pytest.fixture(scope="module")
def draws():
    """Values, 0.7 steps each of them, and 102,400 rounded values of each."""
    values = np.linspace(-2.6, 2.6, 27).astype(np.float32)
    dy = np.broadcast_to(values[:, None, None], (4096, 27, 5, 5)).astype(np.float32)
    return values / 0.7, np.moveaxis(rounded(dy, 0.7, 11)[0], 1, 0).reshape(27, -1) / 0.7


def test_the_mean_is_the_value(draws):
    values, found = draws
    assert abs(found.mean(1, np.float64) - values).max() < 5 / (2 * sqrt(found.shape[1]))


def test_the_variance_is_that_of_two_neighbouring_levels(draws):
    values, found = draws
    fraction = values - np.floor(values)
    assert abs(found.var(1, dtype=np.float64) - fraction * (1 - fraction)).max() < 5 / (4 * sqrt(found.shape[1]))


def test_the_share_of_zeros_of_a_value(draws):
    values, found = draws
    expected = np.maximum(0, 1 - abs(values))
    assert abs((found == 0).mean(1) - expected).max() < 5 / (2 * sqrt(found.shape[1]))


def test_only_the_two_neighbouring_levels_are_taken(draws):
    values, found = draws
    np.testing.assert_allclose(found, np.rint(found), atol=1e-6)
    assert (abs(found - values[:, None]) < 1 + 1e-6).all()


def test_the_variance_of_an_average_falls_with_its_number():
    dy = np.random.default_rng(0).standard_normal((64, 8, 10, 10)).astype(np.float32)
    errors = [rounded(dy, 2.0, seed)[0] - dy for seed in range(16)]
    one = np.mean([e.var(dtype=np.float64) for e in errors])
    for n in (2, 4, 16):
        assert np.mean(errors[:n], 0).var(dtype=np.float64) == pytest.approx(one / n, rel=0.05)


NORMAL = NormalDist()
DATA = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "normal behind a ReLU": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.5),
    "lognormal": lambda rng, n: rng.lognormal(size=n) * rng.choice([-1, 1], n),
}
CLOSED = {
    "normal": lambda s: 2 * (NORMAL.cdf(s) - 0.5) - 2 / s * (1 / sqrt(2 * pi) - NORMAL.pdf(s)),
    "laplace": lambda s: 1 - (1 - exp(-sqrt(2) * s)) / (sqrt(2) * s),
}
ZEROS = {  # for s of 0.5, 1, 2, 4, 8
    "normal": (0.195, 0.369, 0.610, 0.801, 0.900),
    "laplace": (0.283, 0.465, 0.667, 0.824, 0.912),
    "normal behind a ReLU": (0.570, 0.635, 0.743, 0.859, 0.930),
    "lognormal": (0.325, 0.540, 0.726, 0.853, 0.925),
}


@pytest.mark.parametrize("data", DATA)
def test_the_share_of_zeros_of_a_distribution(data):
    passes = Passes("conv", n=480, identity=True)
    dy = DATA[data](np.random.default_rng(0), 480 * 6 * 72).astype(np.float32).reshape(passes.shape)
    shares = []
    for s, table in zip((0.5, 1, 2, 4, 8), ZEROS[data], strict=True):
        method = Dithered(s).attach(passes.model)
        passes.step(dy)
        shares.append(method.report()["0"]["gradient_sparsity"])
        of_data = np.maximum(0, 1 - abs(dy) / (s * dy.std(dtype=np.float64))).mean()
        assert shares[-1] == pytest.approx(of_data, abs=0.005)
        assert shares[-1] == pytest.approx(table, abs=0.01)
        if data in CLOSED:
            assert shares[-1] == pytest.approx(CLOSED[data](s), abs=0.005)
    assert shares == sorted(shares)


# ---- the random numbers


@pytest.fixture(scope="module")
def uniform():
    """The uniform numbers of (48, 8, 16, 16) places, to 1 / 64: how many sixty-fourths they lift to the next level."""
    shape, found = (48, 8, 16, 16), 0
    for i in range(64):
        found += rounded(np.full(shape, i / 64 + 1 / 128, np.float32), 1.0, 2**35 + 1)[0]
    return found / 64


def test_mean_and_variance_of_the_random_numbers(uniform):
    assert abs(uniform.mean() - 0.5) < 5 * sqrt(1 / 12 / uniform.size)
    assert abs(uniform.var() - 1 / 12) < 5 * sqrt(1 / 180 / uniform.size)
    counts = np.bincount(np.rint(uniform * 64).astype(int).reshape(-1), minlength=65)
    counts = np.r_[counts[0] + counts[64], counts[1:64]]  # the first and the last are half as wide
    expected = uniform.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * sqrt(2 * 63)


@pytest.mark.parametrize("axis", range(4), ids=["images", "channels", "rows", "columns"])
@pytest.mark.parametrize("lag", [1, 2, 5])
def test_random_numbers_beside_each_other_are_independent(axis, lag, uniform):
    a = np.moveaxis(uniform, axis, 0)
    r = np.corrcoef(a[lag:].reshape(-1), a[:-lag].reshape(-1))[0, 1]
    assert abs(r) < 5 / sqrt(a[lag:].size)


@pytest.mark.parametrize("axis", range(4), ids=["image", "channel", "row", "column"])
def test_no_image_channel_row_or_column_stands_out(axis, uniform):
    means = uniform.mean(tuple(i for i in range(4) if i != axis))
    assert abs(means - 0.5).max() < 5 * sqrt(len(means) / 12 / uniform.size)


def test_random_numbers_of_passes_layers_and_seeds_are_independent():
    found = []
    for seed in (0, 1, 2):
        for layer in Dithered(seed=seed).attach(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))).attached:
            for layer.passes in (0, 1, 2, 1000):
                lifted = [
                    rounded(np.full((32, 8, 8, 8), i / 16 + 1 / 32, np.float32), 1.0, layer.seed())[0]
                    for i in range(16)
                ]
                found.append(np.sum(lifted, 0).reshape(-1))
    r = np.corrcoef(found)
    assert len(found) == 24
    assert abs(r - np.eye(24)).max() < 5 / sqrt(found[0].size)


def seen(method, name, passes=0):
    """What the layer of this name in a net of two makes of one gradient, after so many passes."""
    model = nn.Sequential(*(Passes("linear", n=300, identity=True).module for _ in range(2)))
    method.attach(model)
    module = dict(model.named_modules())[name]
    dy = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
    for _ in range(passes + 1):
        module(dy)
        dx = module.backward(dy)
    return dx


def test_random_numbers_differ_between_steps_layers_and_seeds():
    first = seen(Dithered(), "0")
    np.testing.assert_array_equal(seen(Dithered(), "0"), first)
    for other in (seen(Dithered(), "0", 1), seen(Dithered(), "1"), seen(Dithered(seed=1), "0")):
        # Two independent samples agree where both are zero, 0.61 each, and on few others
        assert 0.4 < (other == first).mean() < 0.75


@kinds
def test_any_thread_count_gives_the_same_bits(kind, kernel):
    results = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        passes = Passes(kind, Dithered(), n=700 if kind == "linear" else 60)
        results.add(b"".join(a.tobytes() for t in range(2) for a in passes.step(passes.gradient(t))))
    assert len(results) == 1


# ---- a layer


@kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("s", [0.3, 2.0, 8.0])
def test_values_are_multiples_of_s_deviations_of_the_whole_gradient(s, dtype, kind, kernel):
    passes = Passes(kind, Dithered(s), dtype=dtype, identity=True)
    for t, scale in enumerate((1.0, 1e-4)):  # found anew in each step
        dy = passes.gradient(t) * dtype(scale)
        dy[np.random.default_rng(t).random(dy.shape) < 0.5] = 0
        dx = passes.step(dy)[0]
        found = levels(dx, dy, s)
        assert np.count_nonzero(found) > 0
        assert not found[dy == 0].any()
        assert (abs(dx - dy) < 1.0001 * s * dy.std()).all()


@kinds
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
def test_both_products_use_the_same_sample_and_the_bias_none(sparsity, dtype, kind, kernel):
    shown = Passes(kind, Dithered(), dtype=dtype, identity=True)
    passes = Passes(kind, Dithered(), dtype=dtype, identity=True, sparsity=sparsity)
    passes.dense = passes.dense * 3
    passes.module.weight.set_dense(passes.dense)
    for t in range(2):
        dy = passes.gradient(t)
        used = shown.step(dy)[0]
        assert 0 < np.count_nonzero(used) < dy.size
        passes.check(passes.step(dy), used, dy)


@kinds
def test_the_mean_of_both_gradients_is_exact(kind):
    passes = Passes(kind, Dithered(3.0), dtype=np.float64)
    dy = passes.gradient()
    draws = list(zip(*(passes.step(dy) for _ in range(400)), strict=True))
    for found, exact in zip(draws[:2], passes.reference(dy), strict=False):
        found = np.stack(found)
        error = found.std(0, ddof=1) / sqrt(len(found))
        assert error.max() > 0
        assert (abs(found.mean(0) - exact) <= 5.5 * error + 1e-12).all()


@kinds
def test_a_small_s_gives_the_exact_gradient(kind, kernel):
    passes = Passes(kind, Dithered(1e-6), dtype=np.float64)
    dy = passes.gradient()
    for found, exact in zip(passes.step(dy), passes.reference(dy), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * abs(exact).max())


@kinds
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-5, 1e-40, np.nan, np.inf])
def test_a_gradient_without_deviation_is_used_as_it_is(value, kind):
    """Constant, zero, subnormal, or not finite in one place."""
    passes, plain = Passes(kind, Dithered()), Passes(kind)
    dy = np.full(passes.shape, value, np.float32)
    if not np.isfinite(value):
        dy = passes.gradient()
        dy.reshape(-1)[-1] = value
    for found, exact in zip(passes.step(dy), plain.step(dy), strict=True):
        np.testing.assert_array_equal(found, exact)
        assert np.isfinite(found).all() == np.isfinite(value)
    assert passes.method.report()["0"]["gradient_sparsity"] == 0


@kinds
def test_8_bits_clip_and_count(kind, kernel):
    free, passes = (Passes(kind, Dithered(0.01, bits=bits), identity=True) for bits in (None, 8))
    dy = passes.gradient()
    levels_of = levels(free.step(dy)[0], dy, 0.01)
    np.testing.assert_array_equal(levels(passes.step(dy)[0], dy, 0.01), np.clip(levels_of, -127, 127))
    share = (abs(levels_of) > 127).mean()
    assert 0 < share < 0.5
    assert passes.method.report()["0"]["clipped"] == pytest.approx(share)
    assert free.method.report()["0"]["clipped"] == 0


def test_8_bits_change_nothing_where_nothing_is_clipped(kernel):
    """To rounding: the step is a factor of whole sums then."""
    free, passes = (Passes("conv", Dithered(1.0, bits=bits)) for bits in (None, 8))
    for a, b in zip(free.step(free.gradient()), passes.step(free.gradient()), strict=True):
        close(b, a)
    assert passes.method.report()["0"]["clipped"] == 0


# ---- a target


@pytest.mark.parametrize("data", ["normal", "normal behind a ReLU", "lognormal"])
@pytest.mark.parametrize("sparsity", [0.6, 0.92, 0.98])
@pytest.mark.parametrize("s", [0.05, 2.0, 100.0])
def test_the_target_is_reached_and_held(s, sparsity, data):
    passes = Passes("linear", Dithered(s, sparsity=sparsity), n=3000)
    reached = []
    for t in range(45):
        dy = DATA[data](np.random.default_rng(t), 15000).reshape(passes.shape).astype(np.float32)
        passes.step(dy)
        reached.append(passes.method.report()["0"]["gradient_sparsity"])
    np.testing.assert_allclose(reached[-8:], sparsity, atol=0.04)  # heavy tails change the deviation
    assert np.mean(reached[-8:]) == pytest.approx(sparsity, abs=0.01)


def test_each_layer_has_an_s_of_its_own():
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6))
    method = Dithered(sparsity=0.8).attach(model)
    rng = np.random.default_rng(0)
    for _ in range(20):
        model(rng.standard_normal((500, 6)).astype(np.float32))
        model.backward(rng.standard_normal((500, 6)).astype(np.float32))
    first, second = (layer.state["s"] for layer in method.attached)
    assert first != second
    assert method.s == 2.0


def test_s_stays_without_a_target():
    passes = Passes("linear", Dithered(1.5))
    passes.step(passes.gradient())
    assert "s" not in passes.state


def test_the_step_changes_by_a_factor_of_2_at_most():
    passes = Passes("linear", Dithered(1e-3, sparsity=0.99))
    for t in range(3):
        passes.step(passes.gradient(t))
        assert passes.state["s"] == pytest.approx(1e-3 * 2 ** (t + 1))


# ---- training in 8 bits


def rounded_operands(passes, x=None):
    """x as the layer reads it. The reference has its rounded weights from now on."""
    weight = passes.module.weight
    found = int8.round_weight(weight)
    values = found.levels * np.float64(found.scale)
    passes.dense = np.zeros(weight.shape)
    passes.dense[weight.mask if isinstance(weight, SparseParameter) else ...] = values.reshape(weight.data.shape)
    return arrays.unpack(int8.quantize(arrays.pack(passes.x if x is None else x)).restored())


def seeded(kind, **arguments):
    """Passes of a Dithered, or of none without arguments, each with the same bias."""
    st.manual_seed(0)
    return Passes(kind, Dithered(**arguments) if arguments else None)


def outputs(passes, x=None):
    """What the layer makes of x, and what the reference does."""
    x, module = passes.x if x is None else x, passes.module
    if passes.kind == "linear":
        return passes.model(x), ref.linear(x, passes.dense, module.bias.data)
    return passes.model(x), ref.conv2d(x, passes.dense, module.bias.data, module.stride, module.padding)


@kinds
@pytest.mark.parametrize("sparsity", [None, 0.3, 0.8])
def test_the_forward_pass_reads_rounded_x_and_weights(sparsity, kind, isa):
    passes = Passes(kind, Dithered(precision=8), sparsity=sparsity)
    found, plain = outputs(passes)
    assert abs(found - plain).max() > 1e-3  # it is not that of the numbers themselves
    x = rounded_operands(passes)
    close(found, outputs(passes, x)[1])
    with nn.no_grad():
        np.testing.assert_array_equal(passes.model.eval()(passes.x), found)


@kinds
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
def test_both_products_of_8_bits_use_the_same_sample_and_rounded_operands(sparsity, kind, kernel, isa):
    shown = Passes(kind, Dithered(bits=8), identity=True)
    passes = Passes(kind, Dithered(precision=8), identity=True, sparsity=sparsity)
    passes.module.weight.set_dense(
        passes.dense * np.linspace(0.5, 3, 6, dtype=np.float32).reshape(-1, *(1,) * (passes.dense.ndim - 1))
    )
    x = rounded_operands(passes)
    for t in range(2):
        dy = passes.gradient(t)
        used = shown.step(dy)[0]
        assert 0 < np.count_nonzero(used) < dy.size
        passes.check(passes.step(dy), used, dy, x)


@kinds
def test_the_mean_of_both_gradients_is_that_of_the_rounded_operands(kind):
    passes = Passes(kind, Dithered(3.0, precision=8))
    dy, x = passes.gradient(), rounded_operands(passes)
    draws = list(zip(*(passes.step(dy) for _ in range(400)), strict=True))
    assert passes.method.report()["0"]["clipped"] == 0
    for found, exact in zip(draws[:2], passes.reference(dy, x), strict=False):
        found = np.stack(found).astype(np.float64)
        error = found.std(0, ddof=1) / sqrt(len(found))
        assert error.max() > 0
        assert (abs(found.mean(0) - exact) <= 5.5 * error + 1e-6 * abs(exact).max()).all()


@kinds
@pytest.mark.parametrize("value", [1.0, -3e-5])
@pytest.mark.parametrize("sparsity", [None, 0.6], ids=["dense", "sparse"])
def test_a_constant_gradient_meets_the_rounded_operands_as_it_is(sparsity, value, kind):
    passes = Passes(kind, Dithered(precision=8), sparsity=sparsity)
    dy, x = np.full(passes.shape, value, np.float32), rounded_operands(passes)
    for found, exact in zip(passes.step(dy), passes.reference(dy, x), strict=True):
        close(found, exact)
    assert passes.method.report()["0"]["gradient_sparsity"] == 0


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "weight"])
def test_what_is_not_finite_shows_and_the_pass_is_one_of_floats(where, value, kind, kernel):
    passes, floats = seeded(kind, precision=8), seeded(kind, bits=8)
    for p in (passes, floats):
        (p.x if where == "x" else p.module.weight.data)[(-1,) * p.x.ndim] = value
    y = passes.model(passes.x)
    assert not np.isfinite(y).all()
    np.testing.assert_array_equal(y, floats.model(floats.x))
    dy = passes.gradient()
    found, expected = passes.step(dy), floats.step(dy)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.isfinite(found[1 if where == "x" else 0]).all()


@kinds
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows_in_8_bits(value, kind):
    passes = Passes(kind, Dithered(precision=8))
    dy = passes.gradient()
    dy.reshape(-1)[-1] = value
    for found in passes.step(dy):
        assert not np.isfinite(found).all()


@kinds
def test_the_forward_pass_is_exact_again_after_detach(kind):
    passes, plain = seeded(kind, precision=8), seeded(kind)
    rounded_y = passes.model(passes.x)
    passes.method.detach()
    exact = plain.model(plain.x)
    np.testing.assert_array_equal(passes.model(passes.x), exact)
    assert (rounded_y != exact).any()
    for a, b in zip(passes.step(passes.gradient()), plain.step(plain.gradient()), strict=True):
        np.testing.assert_array_equal(a, b)


@kinds
def test_precision_8_clips_counts_and_drops_what_bits_8_does(kind, kernel):
    reports = []
    for s in (0.01, 2.0):
        for bits in ({"precision": 8}, {"bits": 8}):
            passes = Passes(kind, Dithered(s, angles=True, **bits))
            passes.step(passes.gradient())
            reports.append({k: v for k, v in passes.method.report()["0"].items() if k != "ms"})
    assert reports[0] == reports[1] and reports[2] == reports[3]
    assert 0 < reports[0]["clipped"] < 0.5 and reports[2]["clipped"] == 0
    assert 10 < reports[2]["angle"] < 90


def test_a_target_is_held_in_8_bits():
    passes = Passes("linear", Dithered(8.0, sparsity=0.9, precision=8), n=3000)
    for t in range(20):
        passes.step(passes.gradient(t))
    assert passes.method.report()["0"]["clipped"] == 0
    passes.step(passes.gradient(20))
    assert passes.method.report()["0"]["gradient_sparsity"] == pytest.approx(0.9, abs=0.02)


def test_precision_of_some_layers():
    st.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 3))
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal((50, 3)).astype(np.float32)
    seen, read = [], int8.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "conv2d", lambda x, weight, *rest: seen.append(weight) or read(x, weight, *rest))
        method = Dithered(layers={"2": {"precision": 8}}, exclude=("4",)).attach(model)
        model(x)
        model.backward(dy)
        assert seen == [model[2].weight]
        assert [layer.method.precision for layer in method.attached] == [None, 8]
        seen.clear()
        Dithered(precision=8, layers={"0": {"precision": None}}, exclude=("4",)).attach(model)
        model(x)
        assert seen == [model[2].weight]


def test_a_float64_model_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).to(np.float64)
    Dithered(precision=8, exclude=("0",)).attach(model)
    with pytest.raises(TypeError, match="layer '2'.*: products of 8 bits need float32, x is float64"):
        model(np.ones((3, 6)))


@kinds
def test_any_thread_count_gives_the_same_bits_in_8_bits(kind, kernel):
    results = set()
    for threads in (1, 2, 5):
        st.set_num_threads(threads)
        st.manual_seed(0)
        passes = Passes(kind, Dithered(precision=8), n=700 if kind == "linear" else 60)
        found = [passes.model(passes.x), *passes.step(passes.gradient(0)), *passes.step(passes.gradient(1))]
        results.add(b"".join(a.tobytes() for a in found))
    assert len(results) == 1


def test_both_kernels_of_8_bits_give_the_same_to_rounding(monkeypatch):
    found = []
    for skip in (True, False):
        monkeypatch.setattr(sparse_gradient, "skips", lambda *_, skip=skip: skip)
        run = trainer(0.5, momentum=0.0, lr=0.0)
        run.fit(batches(), 1)
        found.append([p.grad for p in run.model.parameters()])
    for a, b in zip(*found, strict=True):
        close(a, b)


def trainer(sparsity=0.0, momentum=0.5, lr=0.05):
    """Of a small residual net, in 8 bits."""
    st.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Residual(body), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    if sparsity:
        sparsify(model, sparsity)
    return Trainer(model, optim.SGD(model.named_parameters(), lr=lr, momentum=momentum), backprop=Dithered(precision=8))


def batches(n=200):
    return data.Batches(*images(n), 32, shuffle=True, seed=3, drop_last=True)


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_a_net_learns_in_8_bits(sparsity):
    run = trainer(sparsity)
    masks = [p.mask for p in run.model.parameters() if isinstance(p, SparseParameter)]
    before = [p.data.copy() for p in run.model.parameters()]
    history = run.fit(batches(400), 6, data.Batches(*images(100, seed=1), 64))
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    stored = [p.mask for p in run.model.parameters() if isinstance(p, SparseParameter)]
    assert len(stored) == len(masks) == (4 if sparsity else 0)
    for a, b in zip(stored, masks, strict=True):
        np.testing.assert_array_equal(a, b)
    for p, was in zip(run.model.parameters(), before, strict=True):
        assert p.data.dtype == np.float32 and (p.data != was).any()


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
def test_going_on_from_a_file_in_8_bits_gives_the_same_bits(sparsity, tmp_path):
    whole, run = trainer(sparsity), trainer(sparsity)
    whole.fit(batches(), 3)
    run.fit(batches(), 2)
    run.save(tmp_path / "run.safetensors")
    resumed = Trainer.resume(tmp_path / "run.safetensors")
    assert resumed.backprop.precision == 8
    resumed.fit(batches(), 1)
    assert resumed.history.column("loss") == whole.history.column("loss")
    for ours, theirs in ((whole.model, resumed.model), (whole.backprop, resumed.backprop)):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert list(ours) == list(theirs)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"s": 0}, ValueError, "s is 0"),
        ({"s": -1}, ValueError, "s is -1"),
        ({"s": np.nan}, ValueError, "s is nan, must be finite"),
        ({"s": "2"}, TypeError, "s is '2', must be a number"),
        ({"s": True}, TypeError, "must be a number"),
        ({"sparsity": 0}, ValueError, "sparsity is 0"),
        ({"sparsity": 1}, ValueError, "sparsity is 1"),
        ({"sparsity": "much"}, TypeError, "must be a number"),
        ({"bits": 4}, ValueError, "bits is 4"),
        ({"bits": "8"}, ValueError, "bits is '8'"),
        ({"precision": 7}, ValueError, "precision is 7, must be 8 or None"),
        ({"precision": "8"}, ValueError, "precision is '8', must be 8 or None"),
        ({"layers": {"0": {"precision": 16}}}, ValueError, "precision is 16"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Dithered(**arguments)


def test_a_target_below_the_zeros_that_are_there_stays_finite():
    p = Passes("linear", Dithered(sparsity=0.5), n=64)
    for i in range(300):
        dy = p.gradient(i) * np.float32(10)
        dy[np.random.default_rng(i).random(dy.shape) < 0.9] = 0
        assert np.isfinite(p.step(dy)[1]).all()
