"mtef_eval --bench: files in the layouts that are published, a scripted judge, numbers counted by hand."
import io, json, re
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from PIL import Image
from mt_editflow_nb.cli.eval import main
from mt_editflow_nb.cli.report import main as report
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.evaluation.bench_scores import mice_scores
from mt_editflow_nb.rewards.edit_r2_rules import read_edit_r2_questions
from mt_editflow_nb.rewards.edival_models import load_edival_vlm
from mt_editflow_nb.rewards.edival_rules import Found
from test_judge_servers import Scripted, impatient  # noqa: F401  (a fixture)

def png(image):
    f = io.BytesIO()
    image.save(f, 'PNG')
    return dict(bytes=f.getvalue(), path=None)

def said(request):
    "The words of a request, and how many pictures it shows."
    content = request['messages'][0]['content']
    return content[-1]['text'], sum(part['type'] == 'image_url' for part in content)

def is_first_question(request):
    "Before an editor is loaded, a judge is asked one small thing: whether it answers at all."
    return 'make it brighter' in said(request)[0]

class Judge(Scripted):
    "A scripted judge; `asked` are the questions of the benchmark."
    def __init__(self, script): super().__init__(lambda request: '5' if is_first_question(request) else script(request))
    @property
    def asked(self): return [request for request in self.requests if not is_first_question(request)]

def command(name, data, out, *more):
    how = ['--steps', '1', '--size', '48', '--batch', '2', '--out', str(out)]
    return ['--bench', name, '--data', str(data), *how, *map(str, more)]

@pytest.fixture
def gedit(tmp_path):
    rows = []
    for i, s in enumerate(shape_sessions(4, 1, 'heldout')):
        wide = Image.new('RGB', (96, 48), 'white')
        wide.paste(s.image, (24, 0))
        rows.append(dict(task_type=['color_alter', 'style_change'][i // 2], key=f'k{i}', instruction=s.instructions[0],
                         instruction_language='en', input_image=png(wide), input_image_raw=png(wide),
                         Intersection_exist=i != 3))
    (tmp_path/'gedit').mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path/'gedit/train-00000-of-00001.parquet')
    return tmp_path/'gedit'

def test_gedit_in_shards_by_a_served_judge_and_replayed(gedit, tmp_path, capsys):
    "Two shards fill one cache; the last call makes the table without one question more."
    answers = iter(['[9, 4]', '[8, 8]', '[9, 9]', '[2, 6]', '[10, 9]', 'I would rather not.', '[4, 5]', '[4, 5]'])
    with Judge(lambda request: answers_of(request)) as server:
        known = {}
        def answers_of(request):
            key = json.dumps(request['messages'])
            if known.get(key, '').startswith('I would'): return known[key]
            return known.setdefault(key, next(answers))
        judge = ['--judge', f'm@{server.url}']
        for shard in ('1/2', '2/2'):
            assert main(command('gedit', gedit, tmp_path/'out', *judge, '--shard', shard)) == 0, capsys.readouterr().err
        n = len(server.asked)
        assert n == 8 + 2 and [said(r)[1] for r in server.asked].count(1) >= 4  # one is asked three times
        assert main(command('gedit', gedit, tmp_path/'out', *judge)) == 0, capsys.readouterr().err
        assert len(server.asked) == n + 3            # what could not be read is asked again, nothing else
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert (results['unreadable'], results['asked']) == (1, 8)
    assert any('4 of the first pictures lost more than 5 %' in text for text in results['differences'])
    made = Image.open(tmp_path/'out/fullset/color_alter/en/k0.png')
    assert made.size == (72, 32)                        # 1504 x 688 is nearest to 2:1, and a token has 8 pixels here
    items = pd.read_csv(tmp_path/'out/items.csv')
    assert items.O.isna().sum() == 1 and sorted(items.intersection) == [False, True, True, True]
    assert (tmp_path/'out/fullset/style_change/en/k3_SRCIMG.png').is_file()
    assert 'Scores of the intersection subset' in (tmp_path/'out/card.md').read_text()

def edit_r2_checkout(folder):
    "Two files of a repository, made up: what the judge of sessions is asked, and what the server of rewards asks."
    (folder/'flow_grpo').mkdir(parents=True)
    (folder/'flow_grpo/edival_client.py').write_text(
        'MULTITURN_VLM_PROMPT = """All turns?\\n{instructions_formatted}"""\n'
        'MULTITURN_CU_VLM_PROMPT = """All turns, and of which?\\n{instructions_formatted}"""\n')
    (folder/'rewards').mkdir()
    (folder/'rewards/edival_reward_server.py').write_text(
        'VLM_ADD_PROMPT = "Added: {instruction}? yes or no"\n'
        'VLM_REPLACE_PROMPT = "Replaced: {instruction}? yes or no"\n'
        'VLM_TEXT_PROMPT = "Which text?"\nVLM_BACKGROUND_PROMPT = "Is it {background}? yes or no"\n'
        'def f(object_name, new_color, new_material):\n'
        '    ask(f"Is the {object_name} now {new_color}? yes or no")\n'
        '    ask(f"Is the {object_name} now made of {new_material}? yes or no")\n')
    return folder

def test_mice_joins_edit_r2s_rules_with_the_walk_through_the_session(tmp_path, capsys):
    "Its own questions to both models; an object counts, though the background may have changed by the second turn."
    s, = shape_sessions(1, 1, 'heldout')
    (tmp_path/'pictures').mkdir()
    s.image.save(tmp_path/'pictures/0.jpg')
    told = ['From now on, all in red. With this rule active, Add cat', 'Remove cat']
    row = dict(image='/elsewhere/0.jpg', instruction=told,
               task_type=['subject_add', 'subject_remove'], formatted_instruction=['Add [cat]', 'Remove [cat]'],
               bg_consistency=[True, False], unchanged_objects=[['dog'], ['dog']], available_objects=[['dog'], ['dog']],
               all_objects=[['dog', 'cat']] * 2, turns=2)
    (tmp_path/'mice/cm').mkdir(parents=True)
    (tmp_path/'mice/cm/test_metadata.jsonl').write_text(json.dumps(row) + '\n')
    box = Found(np.array([[.2, .2, .6, .6]]), np.array([.9]))
    def features(images):
        import torch
        return torch.ones(len(images), 4), torch.ones(len(images), 200, 4)
    def walks(request):
        text, pictures = said(request)
        if text.startswith('Added: '): return 'No.' if text != 'Added: Add [cat]? yes or no' else 'Yes.'
        assert text.startswith('All turns?\n第1轮：From now on, all in red.')
        return f'<answer_final> {"yes" if pictures == 2 else "no"} </answer_final>'
    with Judge(walks) as server:
        asker = load_edival_vlm(f'm@{server.url}', questions=read_edit_r2_questions(edit_r2_checkout(tmp_path/'r2')))
        tools = (lambda image, names, threshold: box, asker, features, None)
        options = ['--images', tmp_path/'pictures', '--judge', f'm@{server.url}', '--questions', tmp_path/'r2',
                   '--vlm', f'm@{server.url}']
        argv = command('mice', tmp_path/'mice', tmp_path/'out', *options)
        assert main(argv, tools=tools) == 0, capsys.readouterr().err
        assert len(server.asked) == 2 + 1
    table = pd.read_csv(tmp_path/'out/scores.csv').set_index(['turn', 'metric']).value
    assert table[1].to_dict() == pytest.approx(dict(IF=100, CC=100, GA=100, weighted=100))
    assert table[2].to_dict() == pytest.approx(dict(IF=0, CC=100, GA=0, weighted=30))  # the cat is still found
    results = json.loads((tmp_path/'out/results.json').read_text())
    differs = '; '.join(results['differences'])
    assert 'our wording' not in differs and f'vlm m@{server.url} (published: Qwen/Qwen2.5-VL-32B-Instruct)' in differs
    assert 'judge at temperature 0 (published: 0.6)' in differs and 'dinov3-vitl16' not in differs
    assert results['facts']['Protocol']['features'] == 'facebook/dinov3-vitl16-pretrain-lvd1689m'

def turns_so_far(request):
    "How many results the judge is shown beside the source."
    return said(request)[1] - 1

def test_lme_runs_ten_turns_and_counts_what_holds_and_what_collapses(tmp_path, capsys):
    "Session a holds to the end, session b fails at its fourth turn; its frames of turns 7 and 8 are destroyed."
    world = shape_sessions(2, 1, 'heldout')
    instructions = [f'add ring {t}' for t in range(10)]
    (tmp_path/'lme/images').mkdir(parents=True)
    for name, s in zip('ab', world): s.image.save(tmp_path/f'lme/images/{name}.png')
    items = [dict(id=name, turns=[f'{name}: {text}' for text in instructions], labels=['local']*10) for name in 'ab']
    (tmp_path/'lme/lme_bench.json').write_text(json.dumps(dict(items=items)))
    (tmp_path/'theirs/mtopsd').mkdir(parents=True)
    (tmp_path/'theirs/mtopsd/judge.py').write_text(
        'PROMPT_TEMPLATE = ("""Judge turn-{num_prompts} of {num_images} images: {editing_prompt} {{}}""")\n'
        'COLLAPSE_PROMPT = """content_loss after\\n{instructions}"""\n')
    def answer(request):
        text, pictures = said(request)
        if 'content_loss' in text:
            assert text.startswith('content_loss after\n  turn1: ')
            lost = 2 if 'b: add ring 6' in text and 'b: add ring 8' not in text else 0
            return json.dumps(dict(reason='', content_loss=lost, surface_corruption=0, appearance_violation=0))
        assert text.startswith(f"Judge turn-{pictures - 1} of {pictures} images: {{'turn1': ") and text.endswith(' {}')
        follows = 6 if 'b: add ring 3' in text else 7                     # both scores must exceed 6
        return json.dumps(dict(reason='', prompt_following=follows, consistency=9))
    with Judge(answer) as server:
        judge = ['--judge', f'm@{server.url}', '--questions', tmp_path/'theirs']
        assert main(command('lme', tmp_path/'lme', tmp_path/'out', *judge)) == 0, capsys.readouterr().err
        asked = [said(request)[0] for request in server.asked]
    assert len(asked) == 10 + 4 + 2*10                                   # b is not asked about after its failure
    results = json.loads((tmp_path/'out/results.json').read_text())
    rates = {(row['metric'], row['turn']): row['value'] for row in results['table']}
    assert [rates['SR', t] for t in (3, 4, 5, 10)] == [100, 50, 50, 50]
    assert [rates['CR', t] for t in (6, 7, 8, 10)] == [0, 50, 50, 50]      # from the first of the two frames on
    assert (results['unreadable'], results['asked']) == (0, 34)
    assert len(list((tmp_path/'out/samples/a').glob('turn*.png'))) == 10
    card = (tmp_path/'out/card.md').read_text()
    assert 'half-life' in card and 'Pictures without a judge' in card and '2 of 10 turns' in card
    assert "the benchmark's, from" in card and 'our wording' not in card

def test_mse_stops_at_the_first_failure_and_counts_the_unreadable(tmp_path, capsys):
    "Sessions of five turns: one right to the end, one failing at turn 2, one whose third answer cannot be read."
    world = shape_sessions(3, 1, 'heldout')
    rows = [dict(index=i, image=png(s.image), context=[f'{name}{t}' for t in range(5)])
            for i, (name, s) in enumerate(zip('abc', world))]
    (tmp_path/'mse').mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path/'mse/test.parquet')
    def answer(request):
        text, _ = said(request)
        if "'c2'" in text: return 'I cannot say.'
        return json.dumps(dict(reason='', prompt_following=8, consistency=5 if "'b1'" in text else 8))
    with Judge(answer) as server:
        judge = ['--judge', f'm@{server.url}']
        assert main(command('mse', tmp_path/'mse', tmp_path/'out', *judge)) == 0, capsys.readouterr().err
        asked = [turns_so_far(request) for request in server.asked]
    assert sorted(asked) == sorted([1, 2, 3, 4, 5] + [1, 2] + [1, 2, 3, 3, 3])       # the last is asked three times
    results = json.loads((tmp_path/'out/results.json').read_text())
    assert any('our wording of the questions' in text for text in results['differences'])
    assert '3 items (published: 100)' in results['differences']
    rates = {row['turn']: row['value'] for row in results['table'] if row['metric'] == 'SR'}
    assert rates[1] == 100 and rates[2] == pytest.approx(200/3) and [rates[t] for t in (3, 4, 5)] == [50, 50, 50]
    assert results['unreadable'] == 1 and (tmp_path/'out/images/1_turn0_rep0_seed1.png').is_file()
    assert re.search(r'\| 1 \| 100\.00 \|', (tmp_path/'out/card.md').read_text())

def test_mice_leaves_out_a_consistency_that_nobody_scored():
    "Void is one half, as Edit-R2 has it; a detector that gave no answer is missing, and its session with it."
    sessions = [SimpleNamespace(meta=dict(bg_consistency=[True], half='cm'))]*2
    right = [[1.], [1.]]
    object_cc = [[np.nan], [.8]]
    background_cc = [[np.nan], [.6]]
    arrays = dict(success=right, object_cc=object_cc, background_cc=background_cc, awareness=right)
    def cc(**more): return mice_scores(sessions, {k: np.array(x) for k, x in (arrays | more).items()}, n_boot=9)[1]
    assert cc()['In percent'].value[1, 'CC'] == pytest.approx((50 + 70)/2)
    missing = cc(cc_unscored=[[True], [False]])['In percent']
    assert missing.value[1, 'CC'] == pytest.approx(70) and missing.sessions[1, 'CC'] == 1

def test_imgedit_leaves_the_answers_where_the_published_steps_read_them(tmp_path, capsys):
    a, b = shape_sessions(2, 1, 'heldout')
    (tmp_path/'imgedit/animal').mkdir(parents=True)
    for name, s in (('1', a), ('2', b)): s.image.save(tmp_path/f'imgedit/animal/{name}.png')
    edits = {'1': dict(id='animal/1.png', prompt=a.instructions[0], edit_type='replace'),
             '2': dict(id='animal/2.png', prompt=b.instructions[0], edit_type='add')}
    (tmp_path/'imgedit/basic_edit.json').write_text(json.dumps(edits))
    (tmp_path/'checkout').mkdir()
    prompts = {kind: f'{kind}: <edit_prompt>' for kind in ('replace', 'add')}
    (tmp_path/'checkout/prompts.json').write_text(json.dumps(prompts))
    lines = 'Brief reasoning: fine.\nPrompt Compliance: 2\nVisual Seamlessness: 5\nPhysical & Detail Fidelity: 4'
    with Judge(lambda request: lines) as server:
        options = ['--judge', f'm@{server.url}', '--questions', tmp_path/'checkout']
        assert main(command('imgedit', tmp_path/'imgedit', tmp_path/'out', *options)) == 0, capsys.readouterr().err
        assert sorted(said(r)[0] for r in server.asked) == sorted(
            [f'replace: {a.instructions[0]}', f'add: {b.instructions[0]}'])
    assert json.loads((tmp_path/'out/edited/result.json').read_text()) == {'1': lines, '2': lines}
    items = pd.read_csv(tmp_path/'out/items.csv', dtype=dict(id=str)).set_index('id').score
    assert items.to_dict() == pytest.approx({'1': 2, '2': 11/3})  # capped where something was replaced
    card = (tmp_path/'out/card.md').read_text()
    assert "the benchmark's, from" in card and 'our wording' not in card
    assert re.search(r'mean of types \| 2\.83', card)

def test_leaderboard_of_runs_beside_published_systems(tmp_path, capsys):
    table = [dict(metric='SR', turn=t, value=90 - 8*t, low=80 - 8*t, high=99 - 8*t, sessions=100) for t in range(1, 11)]
    results = dict(benchmark='lme', table=table, differences=['judge m (published: GPT-4o)'], notes=[], facts={})
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine/results.json').write_text(json.dumps(results))
    assert report([str(tmp_path), '--leaderboard']) == 0, capsys.readouterr().err
    flat = pd.read_csv(tmp_path/'leaderboard/leaderboard.csv')
    assert flat[flat.system == 'mine'].turn.tolist() == [3, 5, 8, 10]
    assert (flat[flat.system != 'mine'].source != 'this run').all() and set(flat.benchmark) == {'lme'}
    page = (tmp_path/'leaderboard/leaderboard.html').read_text()
    text = ' '.join(re.sub('<[^>]*>', ' ', page).split())
    assert '66.0 [56.0, 75.0]' in text and 'judge m (published: GPT-4o)' in page and 'MT-OPSD †' in page
    (tmp_path/'bare.csv').write_text('benchmark,system,metric,turn,value,source\nlme,X,SR,3,50,\n')
    assert report([str(tmp_path), '--leaderboard', '--published', str(tmp_path/'bare.csv')]) == 2
    assert 'row 2: expected a source' in capsys.readouterr().err
    head = 'benchmark,system,metric,turn,value,source'
    right = 'lme,X,SR,3,50,paper'
    for name, lines, words in (
            ('empty', [], ['expected a CSV with columns benchmark, ']),
            ('ragged', [head, right, right + ',more'], ['line 3']),
            ('percent', [head, right, 'lme,Y,SR,3,57.4 %,paper'], ['row 3: expected a number', "'57.4 %'"]),
            ('turn', [head, 'lme,Y,SR,third,57.4,paper'], ['row 2: expected a number', "as turn", "'third'"]),
            ('infinite', [head, 'lme,Y,SR,3,inf,paper'], ['row 2: expected a number']),
            ('nobody', [head, 'lme,,SR,3,5,paper'], ['row 2: expected a system']),
            ('twice', [head, right, right], ['row 3: expected each number once (row 2 has it)', 'lme, X, SR at turn'])):
        (tmp_path/f'{name}.csv').write_text('\n'.join(lines))
        assert report([str(tmp_path), '--leaderboard', '--published', str(tmp_path/f'{name}.csv')]) == 2
        said = capsys.readouterr().err
        assert all(w in said for w in [f'{name}.csv', *words]) and said.count('\n') == 1, said
