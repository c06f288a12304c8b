"Turn branching: all members of a group edit one picture at every turn, at the cost of chains."
import json
from types import SimpleNamespace
import numpy as np, pytest, torch
from safetensors.torch import load_file
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.iterate import iterate, turn_advantages
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.rollout import turn_histories
from mt_editflow_nb.rewards.cube import Scores, load_judge
from mt_editflow_nb.training.iteration_log import iteration_signals
from mt_editflow_nb.training.train import train

small = dict(sessions_per_iteration=2, group=3, turns=3, num_steps=2, lora_rank=2, iterations=4, save_every=2)
branching = dict(branching='random', credit='local')
verifier = load_judge('verifier')

def one_iteration(judge=verifier, **settings):
    "What the first iteration leaves behind."
    config = make_config(small | settings)
    return iterate(config, Policy(config, load_editor(lora_rank=2)), shape_sessions(2, 3), judge, 0)

@pytest.mark.parametrize('algorithm', ['nft', 'grpo'])
def test_the_cost_of_chains(algorithm):
    everything = dict(algorithm=algorithm, min_std=0.)
    chains = one_iteration(**everything)
    branched = one_iteration(**everything, **branching)
    assert chains.metrics['passes']['sampled'] == branched.metrics['passes']['sampled'] == 2*3*3*2
    assert branched.metrics['passes'].keys() == chains.metrics['passes'].keys()
    assert branched.metrics['passes']['trained'] == branched.metrics['rows']*3
    assert branched.rollout.clean_TNLC.shape == chains.rollout.clean_TNLC.shape
    assert torch.equal(branched.rollout.clean_TNLC[0], chains.rollout.clean_TNLC[0])           # turn 1 is the same
    assert torch.equal(branched.scores.rewards_PGTM[:, :, 0], chains.scores.rewards_PGTM[:, :, 0])

def test_members_edit_one_picture():
    _, made, scores, _ = one_iteration(**branching)
    inputs_TPGLC = made.inputs_TNLC.unflatten(1, (2, 3))
    assert torch.equal(inputs_TPGLC, inputs_TPGLC[:, :, :1].expand_as(inputs_TPGLC))
    for p in range(2):
        for t in range(2):
            picture = made.images_PGTHWC[p, made.chosen_PT[p, t], t]
            assert torch.allclose(inputs_TPGLC[t + 1, p, 0], load_editor().encode_image(picture[None])[0], atol=1e-5)
            last = turn_histories(made.images_PGTHWC, t + 1, made.chosen_PT)[p]
            assert (last[:, t] == picture).all()
    for t in range(3):                             # scores of a turn: of each member's own picture on the shared ones
        expected = verifier(shape_sessions(2, 3), turn_histories(made.images_PGTHWC, t, made.chosen_PT))
        assert torch.equal(scores.rewards_PGTM[:, :, t], expected.rewards_PGTM[:, :, t])

def test_one_session_an_iteration():
    "As a process has it where there are as many of them as sessions."
    config = make_config(small | branching | dict(sessions_per_iteration=1))
    _, made, scores, _ = iterate(config, Policy(config, load_editor(lora_rank=2)), shape_sessions(1, 3), verifier, 0)
    of_two = one_iteration(**branching)
    assert made.images_PGTHWC.shape == (1, 3, 3, 48, 48, 3)
    assert torch.equal(made.chosen_PT, of_two.rollout.chosen_PT[:1])
    assert (made.images_PGTHWC == of_two.rollout.images_PGTHWC[:1]).all()

def test_a_judge_of_turns_and_one_of_sessions_are_asked_alike():
    class ByTurn:
        by_turn = True
        rewards = ('if', 'cc')
        def check(self, scores, total=None): assert not scores.failed
        def score(self, sessions, images_PGTHWC, turn, seed):
            assert images_PGTHWC.shape[2] == turn + 1
            whole = verifier(sessions, images_PGTHWC)
            names = ('rewards_PGTM', 'success_PGT', 'object_cc_PGT', 'background_cc_PGT')
            return Scores(whole.names, *(getattr(whole, name)[:, :, -1:] for name in names))
    one = one_iteration(**branching)
    other = one_iteration(ByTurn(), **branching)
    assert torch.equal(one.scores.rewards_PGTM, other.scores.rewards_PGTM) and torch.equal(one.adv_PGT, other.adv_PGT)

def test_advantages_by_hand():
    "Two sessions, two members, two turns; only if counts. Each turn compares the members that edited one picture."
    follow_PGT = torch.tensor([[[1., .8], [0., .2]], [[.4, 0.], [.6, .2]]])
    rewards_PGTM = torch.stack([follow_PGT, torch.ones_like(follow_PGT)], -1)
    scores = SimpleNamespace(rewards_PGTM=rewards_PGTM, success_PGT=(follow_PGT > .7).float())
    settings = small | branching | dict(weights=[1, 0], std='none', fusion='reward')
    local = turn_advantages(make_config(settings), scores)
    torch.testing.assert_close(local, torch.tensor([[[.5, .3], [-.5, -.3]], [[-.1, -.1], [.1, .1]]]))

def test_the_monitor_compares_with_the_picture_that_was_edited():
    "A judge that is no verifier is compared with one that saw the same pictures."
    config = make_config(small | branching | dict(judge='tiny:logit'))
    sessions = shape_sessions(2, 3)
    editor = load_editor(lora_rank=2)
    _, made, scores, adv_PGT = iterate(config, Policy(config, editor), sessions, verifier, 0)
    signals = iteration_signals(config, editor, sessions, made, scores, adv_PGT)
    assert signals['gap'] == {'if': 0, 'cc': 0}

@pytest.mark.parametrize(('wrong', 'words'), [
    (dict(branching='best', credit='local'), "branching: expected 'none' or 'random'.*, received 'best'"),
    (dict(branching='random'), 'credit: expected'),
    (dict(branching='random', credit='to_go'), 'credit: expected'),
    (dict(branching='random', credit='local', turns=1), 'branching: expected'),
    (dict(branching='random', credit='local', judge='tiny:logit:coarse'), 'judge: expected'),
    (dict(branching='random', algorithm='sft'), 'branching|credit')])
def test_refused_with_one_line(wrong, words):
    with pytest.raises(InputError, match=words) as e: make_config(small | wrong)
    assert '\n' not in str(e.value)

def test_resumed_with_the_same_numbers(tmp_path):
    config = make_config(small | branching | dict(group=2, iterations=2, save_every=1, eval_sessions=2))
    calls = []
    def stops(sessions, images):
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt       # in the second iteration, three turns each
        return verifier(sessions, images)
    with pytest.raises(KeyboardInterrupt): train(config, tmp_path/'cut', judge=stops, progress=False)
    for name in ('cut', 'whole'): train(config, tmp_path/name, progress=False)
    logs = [(tmp_path/name/'metrics.jsonl').read_text() for name in ('cut', 'whole')]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 2
    assert json.loads(logs[0].splitlines()[0])['passes']['sampled'] == 24
    cut, whole = (load_file(tmp_path/name/'lora'/'pytorch_lora_weights.safetensors') for name in ('cut', 'whole'))
    assert all(np.array_equal(cut[k], whole[k]) for k in cut)
