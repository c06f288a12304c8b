"How much of a gradient is signal, against gradients whose signal is known."
import sys
from types import SimpleNamespace
import pytest, torch
from helpers import run_notebook
from readme import root
from mt_editflow_nb.data.files import read_json_lines

@pytest.fixture(scope='module')
def measures():
    sys.path.insert(0, str(root/'experiments'))
    try: import gradient_signal
    finally: sys.path.pop(0)
    return gradient_signal

def draws(mean_X, B, K, of_batch=0., seed=0):
    "Gradients of K groups of B batches: a mean, noise that the groups of a batch share, and noise of their own."
    generator = torch.Generator().manual_seed(seed)
    def noise(*shape): return torch.randn(*shape, len(mean_X), generator=generator, dtype=torch.double)
    return mean_X + of_batch*noise(B, 1) + noise(B, K)

def test_signal_is_the_mean_and_nothing_that_a_batch_has_in_common(measures):
    "A mean of squared length 5 in 50 numbers of variance 1, and then of variance 1 + 3: .1 and .025."
    mean_X = torch.full((50,), .1**.5).double()
    for of_batch, expected in ((0, .1), (3**.5, .025)):
        snr, error = measures.signal_to_noise(draws(mean_X, 1000, 2, of_batch))
        assert snr == pytest.approx(expected, abs=3*error) and error < .15*expected

def test_what_follows_is_paid_to_the_member_that_went_on(measures):
    "By hand: two sessions, members and turns. What follows turn 1 is worth .5 and .1, on average .3."
    rewards_PGTM = torch.tensor([[[1., .8], [0., .2]], [[.4, 0.], [.6, .2]]])[..., None]
    paid = measures.add_what_follows(rewards_PGTM, torch.tensor([[0], [1]]))[..., 0]
    by_hand = torch.tensor([[[1 + .5, .8], [0 + .3, .2]], [[.4 + .3, 0.], [.6 + .1, .2]]])
    torch.testing.assert_close(paid, by_hand)

def test_the_best_member_goes_on(measures):
    score_PG = torch.tensor([[.2, .9, .4], [.7, .1, .7]])
    scores = SimpleNamespace(names=('if', 'cc'), rewards_PGTM=score_PG[..., None, None].expand(2, 3, 1, 2))
    scorer = SimpleNamespace(of_turn=lambda turn: scores)
    drawn = torch.stack([measures.draw_best(scorer, turn, [(0, 0, 'a', 0), (0, 0, 'b', 0)]) for turn in range(20)], 1)
    assert set(drawn[0].tolist()) == {1} and set(drawn[1].tolist()) == {0, 2}              # of equals, one at random

def test_noise_alone_is_no_signal(measures):
    snr, error = measures.signal_to_noise(draws(torch.zeros(50).double(), 200, 4, of_batch=2.))
    assert abs(snr) < 3*error
    assert measures.cosine_of_means(*(draws(torch.zeros(50).double(), 200, 1, seed=k)[:, 0] for k in (1, 2))) is None

def test_the_cosine_of_two_means_is_free_of_the_noise_that_both_have(measures):
    "60 degrees apart; noise that both estimates share, as on the same batches, would make them look alike."
    a_X = torch.zeros(50).double()
    b_X = torch.zeros(50).double()
    a_X[0] = 2
    b_X[0] = 1
    b_X[1] = 3**.5
    noise_BX = draws(torch.zeros(50).double(), 1000, 1)[:, 0]
    assert measures.cosine_of_means(a_X + noise_BX, b_X + noise_BX) == pytest.approx(.5, abs=.05)
    assert torch.cosine_similarity(a_X + noise_BX, b_X + noise_BX).mean() > .9

def test_the_notebook_shows_the_committed_numbers(runner):
    results = root/'experiments/results'
    executed = runner.submit(run_notebook, root/'experiments/limit.ipynb', dict(results=str(results))).result()
    outputs = [o for c in executed.cells for o in c.get('outputs', [])]
    text = ''.join(''.join(o.get('text', '')) for o in outputs)
    rewards = [r for r in read_json_lines(results/'signal.jsonl') if r['what'] == 'reward']
    base = next(r for r in rewards if r['stage'] == 'base')
    assert f"before training: {base['batches']} batches" in text
    assert f"before training: {base['cosine_of_rewards']:.2f}" in text
    assert sum('image/png' in o.get('data', {}) for o in outputs) == 5
