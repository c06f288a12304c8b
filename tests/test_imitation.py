"The last iterations of a run repeat its own right results, and a run that is cut goes on with the same ones."
import json, shutil
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.imitation import best_right, right_edits
from mt_editflow_nb.algorithm.iterate import iterate
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.cli.train import main
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.sessions import Session, load_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.rollout import Shard
from mt_editflow_nb.rewards.cube import Scores, load_judge
from mt_editflow_nb.training import train as train_chapter
from mt_editflow_nb.training.budget import count_rows
from mt_editflow_nb.training.own_results import edit_batches, with_own_results, without_damage
from mt_editflow_nb.training.source import session_source
from mt_editflow_nb.training.train import train

small = dict(sessions_per_iteration=2, group=3, turns=3, num_steps=2, lora_rank=2, iterations=6, imitate=.5,
             eval_sessions=2, save_every=1, branching='random', credit='local')
verifier = load_judge('verifier')

def adapter(run): return load_file(run/'lora'/'pytorch_lora_weights.safetensors')

def rows(run): return [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]

def kept(run): return [s for file in sorted(run.glob('right/*/sessions.jsonl')) for s in load_sessions(file)]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that was not cut."
    run = tmp_path_factory.mktemp('imitation')/'whole'
    train(make_config(small), run, progress=False)
    return run

def test_samples_first_and_repeats_then(whole):
    log = rows(whole)
    assert [row['passes'].get('sampled', 0) for row in log] == [2*3*3*2]*3 + [0]*3
    assert [row['passes']['trained'] for row in log[3:]] == [2*3]*3              # sessions times members
    assert [('if' in row, 'push' in row) for row in log] == [(True, True)]*3 + [(False, False)]*3

def test_small_steps_at_a_rate_of_their_own(tmp_path):
    train(make_config(small | dict(lr=.003, imitate_edits=4, imitate_lr=.01)), tmp_path/'run', progress=False)
    log = rows(tmp_path/'run')
    assert [row['rows'] for row in log[3:]] == [4]*3
    assert [row['lr'] for row in log] == pytest.approx([.003, .003*5/6, .003*4/6, .01, .01*2/3, .01/3])

def test_what_is_kept_is_right(whole):
    edits = kept(whole)
    images_PGTHWC = np.stack([np.asarray(e.target_images()[0]) for e in edits])[:, None, None]
    assert len(edits) > 3 and verifier(edits, images_PGTHWC).success_PGT.all()
    turns = {e.id.split(':')[0].split('/')[2] for e in edits}
    assert turns > {'1'}                                                          # later turns, too

@pytest.mark.parametrize('cut', [1, 4], ids=['while it samples', 'while it repeats'])
def test_cut_and_resumed(whole, tmp_path, monkeypatch, cut):
    real = train_chapter.step_of
    def stops(config, iteration):
        if iteration == cut: raise KeyboardInterrupt
        return real(config, iteration)
    monkeypatch.setattr(train_chapter, 'step_of', stops)
    with pytest.raises(KeyboardInterrupt): train(make_config(small), tmp_path/'run', progress=False)
    monkeypatch.undo()
    train(make_config(small), tmp_path/'run', progress=False)
    assert rows(tmp_path/'run') == rows(whole) and len(rows(whole)) == 6
    a = adapter(tmp_path/'run')
    b = adapter(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert [e.id for e in kept(tmp_path/'run')] == [e.id for e in kept(whole)]

def test_a_run_folder_from_before_there_were_rates(whole):
    "What was kept without a failure rate is repeated evenly."
    edits = [replace(edit, meta={}) for edit in kept(whole)]
    single = edit_batches(edits, 1, seed=0)
    drawn = [single(k)[0].id for k in range(200*len(edits))]
    assert all(abs(drawn.count(edit.id) - 200) < 5*200**.5 for edit in edits)

def test_the_consistency_that_an_edit_has_lost(whole):
    "The judge's consistency of the turn before, of the member that went on, minus that of the result."
    sessions = session_source(make_config(small)).batch(0)
    policy = Policy(make_config(small), load_editor(lora_rank=2))
    step = iterate(make_config(small), policy, sessions, verifier, 0)
    cc_PGT = step.scores.rewards_PGTM[..., 1]
    best_PT = best_right(make_config(small), step.scores)
    before = {f'0/{p}/1': 1. for p in range(2)}
    before |= {f'0/{p}/{t + 2}': cc_PGT[p, step.rollout.chosen_PT[p, t], t].item() for p in range(2) for t in range(2)}
    first = [e for e in kept(whole) if e.id.startswith('0/')]
    assert len(first) == (best_PT >= 0).sum() > 1
    for edit in first:
        name = edit.id.split(':')[0]
        p = int(name.split('/')[1])
        t = int(name.split('/')[2]) - 1
        lost = before[name] - cc_PGT[p, best_PT[p, t], t].item()
        assert edit.meta['consistency_lost'] == [pytest.approx(lost, abs=1e-4)] and edit.meta['turn'] == [t + 1]

def test_what_has_damaged_the_rest_is_not_repeated(whole, tmp_path):
    "It is kept in the folder, where the others are, and no batch has it."
    usual = [dict(turn=[1], consistency_lost=[.06 + .01*(n % 3)]) for n in range(len(kept(whole)))]
    edits = [replace(edit, meta=edit.meta | lost) for edit, lost in zip(kept(whole), usual)]
    edits[2].meta['consistency_lost'] = [.2]
    assert [e.id for e in without_damage(edits)] == [e.id for n, e in enumerate(edits) if n != 2]
    again = make_config(small | dict(iterations=400))
    copy = tmp_path/'copy'
    known = {e.id: e.meta for e in edits}
    shutil.copytree(whole, copy)
    for file in copy.glob('right/*/sessions.jsonl'):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(''.join(json.dumps(line | dict(meta=known[line['id']])) + '\n' for line in lines))
    source = with_own_results(session_source(again), again, copy)
    repeated = {e.id for i in range(200, 400) for e in source.batch(i)}
    assert edits[2].id in {e.id for e in kept(copy)} and repeated == {e.id for e in edits} - {edits[2].id}

def scored(cc, **terms):
    "Scores of one session, one member and as many turns as there are numbers."
    cc_PGT = torch.tensor([[cc]])
    unknown_PGT = torch.full_like(cc_PGT, torch.nan)
    rewards_PGTM = torch.stack([torch.ones_like(cc_PGT), cc_PGT], -1)
    terms = {f'{name}_cc_PGT': torch.tensor([[values]]) for name, values in terms.items()}
    given = dict(object_cc_PGT=unknown_PGT, background_cc_PGT=unknown_PGT) | terms
    return Scores(('if', 'cc'), rewards_PGTM, torch.ones_like(cc_PGT), **given)

nan = float('nan')

def lost(scores, judge=verifier):
    "What each turn of one chain has lost; None where it is not known."
    images = np.zeros((1, 1, 3, 2, 2, 3), np.uint8)
    sampled = SimpleNamespace(shard=Shard([0], [0]), chosen_PT=None, images_PGTHWC=images)
    session = Session('s', Image.new('RGB', (2, 2)), ['a', 'b', 'c'])
    step = SimpleNamespace(rollout=sampled, scores=scores, metrics=dict(iteration=0))
    edits = right_edits(make_config(dict(weights=[1., 0.])), [session], step, judge)
    return [e.meta.get('consistency_lost', [None])[0] for e in edits]

def test_what_is_not_known_is_not_called_lost():
    assert lost(scored([.9, .7, .6])) == pytest.approx([.1, .2, .1], abs=1e-4)
    assert lost(scored([.9, nan, .6])) == [pytest.approx(.1, abs=1e-4), None, None]
    # nothing to compare at turn 2, where a judge with terms gives .5
    assert lost(scored([.9, .5, .6], object=[.9, nan, .6])) == [pytest.approx(.1, abs=1e-4), None, None]
    without = scored([.9, .5, .6])
    without.names = ('if', 'quality')
    assert lost(without) == [None]*3

def test_a_joint_judge_has_seen_the_turn_alone():
    assert lost(scored([.9, .4, .4]), SimpleNamespace(joint=True)) == pytest.approx([.1, .6, .6], abs=1e-4)

def test_another_run_learns_from_them(whole, tmp_path):
    together = tmp_path/'right.jsonl'
    lines = [json.loads(line) | dict(folder=str(file.parent)) for file in sorted(whole.glob('right/*/sessions.jsonl'))
             for line in file.read_text().splitlines()]
    for line in lines:
        folder = line.pop('folder')
        line |= dict(image=f"{folder}/{line['image']}", targets=[f'{folder}/{x}' for x in line['targets']])
    together.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert main([f'sessions={together}', 'allow_outside=true', 'heldout=training', 'algorithm=sft', 'iterations=1',
                 'sessions_per_iteration=2', 'group=2', 'judge=verifier', '--run', str(tmp_path/'run')]) == 0
    assert rows(tmp_path/'run')[0]['rows'] == 4

def test_nothing_right(tmp_path):
    def strict(sessions, images_PGTHWC):
        scores = verifier(sessions, images_PGTHWC)
        scores.success_PGT[:] = 0
        return scores
    with pytest.raises(InputError, match='imitate: expected right results of the 3 iterations before, .*none') as e:
        train(make_config(small), tmp_path/'run', judge=strict, progress=False)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize(('wrong', 'words'), [
    (dict(imitate=1.), 'imitate: expected .*less than 1'),
    (dict(imitate=-.1), 'imitate: expected .*0'),
    (dict(imitate=0., imitate_lr=.01), 'imitate_lr: expected null for .* with imitate=0'),
    (dict(judge='tiny:logit:coarse', branching='none', credit='broadcast'), 'judge: expected .* with imitate'),
    (dict(algorithm='sft', branching='none', credit='broadcast'), 'imitate: expected algorithm=nft or grpo')])
def test_refused_with_one_line(wrong, words):
    with pytest.raises(InputError, match=words) as e: make_config(small | wrong)
    assert '\n' not in str(e.value)

def test_the_plan_counts_both_kinds():
    "Of six iterations three sample 36 rows and train 6 (members are alike at pure noise), three repeat 6."
    counted = count_rows(make_config(small | dict(train_levels=1)), 3)
    assert counted == dict(sampled=18, trained=(3*6 + 3*6)/6, compared=3)
    few = count_rows(make_config(small | dict(imitate_edits=4, train_levels=1)), 3)
    assert few == counted | dict(trained=(3*6 + 3*4)/6)
    without = count_rows(make_config(small | dict(imitate=0., train_levels=1)), 3)
    assert without == dict(sampled=36, trained=6, compared=6)
