"""Learning rates as functions of the step."""

import pytest

from sparsetrain import optim


def values(schedule, steps):
    return [schedule(step) for step in range(steps)]


def test_constant():
    assert values(optim.constant(0.1), 3) == [0.1, 0.1, 0.1]


def test_step():
    assert values(optim.step(1.0, every=2, factor=0.5), 6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine():
    schedule = optim.cosine(1.0, steps=4, final=0.2)
    assert values(schedule, 7) == pytest.approx([1, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5, 0.2, 0.2, 0.2])


def test_warmup_scales_the_schedule():
    assert values(optim.warmup(optim.constant(1.0), 4), 6) == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = optim.cosine(1.0, steps=8)
    assert values(optim.warmup(cosine, 2), 4) == [0.5 * cosine(0), cosine(1), cosine(2), cosine(3)]
    assert values(optim.warmup(cosine, 0), 8) == values(cosine, 8)


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_agrees_with_torch(name):
    torch = pytest.importorskip("torch")
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    if name == "step":
        ours = optim.step(0.3, every=3, factor=0.1)
        theirs = torch.optim.lr_scheduler.StepLR(twin, 3, 0.1)
    else:
        ours = optim.cosine(0.3, steps=9, final=0.01)
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(twin, 9, 0.01)
    for step in range(10):
        assert ours(step) == pytest.approx(twin.param_groups[0]["lr"], rel=1e-9)
        twin.step()
        theirs.step()


def test_bad_arguments():
    cases = [
        (lambda: optim.constant(-1.0), ValueError, "lr is -1"),
        (lambda: optim.step(0.1, every=0), ValueError, "every is 0"),
        (lambda: optim.cosine(0.1, steps=0), ValueError, "steps is 0"),
        (lambda: optim.cosine(0.1, steps=5, final=-1), ValueError, "final is -1"),
        (lambda: optim.warmup(0.1, 5), TypeError, "schedule is 0.1"),
        (lambda: optim.warmup(optim.constant(0.1), -1), ValueError, "steps is -1"),
    ]
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()
