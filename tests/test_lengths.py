"Sessions of different length in one file: trained on, evaluated, and reported turn by turn."
import threading
from dataclasses import replace
import numpy as np, torch
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import read_json
from mt_editflow_nb.data.sessions import save_sessions
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.data.sizes import FittedPicture
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.evaluation.running import evaluate
from mt_editflow_nb.evaluation.scores import compare, stored_turns
from mt_editflow_nb.explore.strips import read_strips, session_strip
from mt_editflow_nb.rewards.cube import Scores, load_judge
from mt_editflow_nb.training.runs import results_table
from mt_editflow_nb.training.source import shuffled_part
from mt_editflow_nb.training.train import experiment
from helpers import wait_for

def right_where_asked(sessions, images_PGTHWC):
    "Turn 1 is right, turn 2 in sessions of three turns alone, turn 3 never; turn 2 of session `x` is unscored."
    P, G, T = images_PGTHWC.shape[:3]
    success = torch.zeros(P, G, T)
    success[..., 0] = 1
    if T == 3: success[..., 1] = 1
    for p, s in enumerate(sessions):
        if s.id == 'x': success[p, :, 1] = torch.nan
    ones = torch.ones(P, G, T)
    noise = torch.from_numpy(images_PGTHWC.mean((3, 4, 5))/255).float()
    return Scores(('if', 'cc'), torch.stack([noise, ones], -1), success, ones, ones)

def test_a_run_over_sessions_of_two_and_three_turns(tmp_path):
    sessions = [*shape_sessions(4, 2, seed=1), *(replace(s, id=f'three {s.id}') for s in shape_sessions(2, 3, seed=2))]
    sessions[0] = replace(sessions[0], id='x')
    file = save_sessions(sessions, tmp_path/'mine', same_turns=False)
    config = make_config(dict(sessions=str(file), heldout='training', sessions_per_iteration=1, group=2, iterations=2,
                              num_steps=2, train_timesteps=1, lora_rank=1, judge='tiny:logit', eval_judge='tiny:logit',
                              turn_weights={2: 1, 3: 1}))
    results = experiment(config, tmp_path/'run', right_where_asked, progress=False)
    rows = {(r['turn'], r['metric']): r for r in results['table']}
    assert [rows[t, 'IF']['sessions'] for t in (1, 2, 3)] == [6, 6, 2]
    assert [rows[t, 'marginal']['before'] for t in (1, 2, 3)] == [100, 40, 0]       # 2 of the 5 that are scored
    assert [rows[t, 'IF']['before'] for t in (1, 2, 3)] == [100, 40, 0]
    assert [rows[t, 'IF']['before_unscored'] for t in (1, 2, 3)] == [0, 1, 0]
    assert results['unscored'] == dict(before=1, after=1) and results['turns'] == 3
    text = results_table(results)
    assert text.splitlines()[0].endswith('sessions') and text.splitlines()[-3].split()[-1] == '2'
    assert 'before: 1 of 14 turns could not be scored' in text
    assert read_json(tmp_path/'run'/'config.json')['config']['turn_weights'] == {'2': 1.0, '3': 1.0}
    assert experiment(config, tmp_path/'run', right_where_asked, progress=False) == results # nothing is done twice
    turns = [2, 2, 2, 2, 3, 3]
    assert [stored_turns(tmp_path/'run'/f'{name}.safetensors') for name in ('before', 'after')] == [turns, turns]
    against_itself = compare(tmp_path/'run', tmp_path/'run')
    assert against_itself.a.xs('IF', level='metric').tolist() == [rows[t, 'IF']['after'] for t in (1, 2, 3)]
    strips = read_strips(tmp_path/'run')
    assert [session_strip(strips, p).count('alt="turn ') for p in (0, 5)] == [4, 6]
    assert len(list((tmp_path/'run'/'rollouts').glob('heldout_*.png'))) == 6

def test_an_epoch_shows_every_session_once_in_an_order_of_its_own():
    first = shuffled_part(7, 0, 7, 3)
    second = shuffled_part(7, 7, 7, 3)
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert shuffled_part(7, 5, 4, 3) == [*first[5:], *second[:2]]                     # across the end of an epoch
    assert first == np.random.default_rng((3, 0)).permutation(7).tolist()

def test_pictures_of_the_next_batch_are_opened_while_one_is_judged():
    "By another thread, one batch ahead and no further; the results are those of pictures in memory."
    made = shape_sessions(6, 1, 'heldout')
    opened = []
    before_judging = []
    def stored(i, s):
        def open_picture():
            opened.append((i, threading.current_thread() is threading.main_thread()))
            return s.image
        return replace(s, image=FittedPicture(open_picture, 48, 48))
    judge = load_judge('verifier')
    def slow(sessions, images_PGTHWC):
        ahead = min(6, 2*(len(before_judging) + 2))               # those of this batch and of the next
        wait_for(lambda: len(opened) >= ahead)
        before_judging.append(len(opened))
        return judge(sessions, images_PGTHWC)
    editor = load_editor()
    how = dict(num_steps=1, batch=2)
    outcomes, _ = evaluate(editor, [stored(i, s) for i, s in enumerate(made)], slow, **how)
    assert before_judging == [4, 6, 6] and opened == [(i, False) for i in range(6)]
    np.testing.assert_array_equal(outcomes.success_IT, evaluate(editor, made, judge, **how)[0].success_IT)
