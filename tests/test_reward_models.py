"Reward models as judges by name: words behind a server, numbers of heads in this process."
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.flux2 import byte_tokenizer
from mt_editflow_nb.editing.qwen import tiny_vision_language_model
from mt_editflow_nb.rewards.agreement import ask_repeatedly, session_labels
from mt_editflow_nb.rewards.cube import load_judge
from mt_editflow_nb.rewards.edival_models import load_quality
from mt_editflow_nb.rewards.reward_models import REWARD_TOKEN
from test_judge_servers import Scripted, impatient  # noqa: F401  (a fixture)

sessions = shape_sessions(1, 2, 'heldout')
images = np.random.default_rng(0).integers(0, 256, (1, 2, 2, 48, 48, 3), np.uint8)

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "Random weights of the real class, in the layout of EditReward's authors."
    folder = tmp_path_factory.mktemp('editreward')
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(dict(additional_special_tokens=[REWARD_TOKEN]), replace_extra_special_tokens=False)
    tokenizer.model_max_length = 4096
    torch.manual_seed(0)
    model = tiny_vision_language_model(tokenizer)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder/'preprocessor_config.json').write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    state = {key: x.clone().contiguous() for key, x in model.state_dict().items()}
    for head in ('rm_heads.head_0', 'rm_heads.head_1', 'rm_head'):
        for i, (rows, columns) in {0: (16, 32), 3: (4, 16), 5: (2, 4)}.items():
            state |= {f'{head}.{i}.weight': torch.randn(rows, columns)/4, f'{head}.{i}.bias': torch.randn(rows)/4}
    save_file(state, folder/'model.safetensors')
    return folder

def test_editreward_is_a_judge_of_two_rewards_and_replays(checkpoint, tmp_path):
    name = f'editreward:{checkpoint}'
    judge = load_judge(name, cache=tmp_path/'judge.sqlite', device='cpu')
    scores = judge(sessions, images)
    assert scores.names == ('if', 'quality') and scores.failed == 0
    assert scores.rewards_PGTM.shape == (1, 2, 2, 2)
    assert ((scores.rewards_PGTM > 0) & (scores.rewards_PGTM < 1)).all()
    assert len(scores.rewards_PGTM.unique()) > 4 and not scores.success_PGT.isnan().any()
    offline = load_judge(name, cache=tmp_path/'judge.sqlite', offline=True, device='cpu')
    assert torch.equal(offline(sessions, images).rewards_PGTM, scores.rewards_PGTM)
    assert 'loaded' not in vars(offline.mode.keywords['heads'])     # replayed without weights

def test_hpsv3_sees_the_result_alone(checkpoint):
    judge = load_judge(f'hpsv3:{checkpoint}', device='cpu')
    scores = judge(sessions, images)
    assert scores.names == ('quality',) and scores.success_PGT.isnan().all()
    other = shape_sessions(1, 2, 'heldout', seed=9)
    assert torch.equal(judge(other, images).rewards_PGTM, scores.rewards_PGTM)

def test_hpsv3_measures_quality_as_edival_does(checkpoint):
    "The number of its head, without a bound and without a prompt: the inverse of what the judge squashes."
    quality = load_quality(f'hpsv3:{checkpoint}', device='cpu')([Image.fromarray(x) for x in images[0, 0]])
    scores = load_judge(f'hpsv3:{checkpoint}', device='cpu')(sessions, images[:, :1]).rewards_PGTM[0, 0, :, 0]
    np.testing.assert_allclose(1/(1 + np.exp(-quality/5)), scores.numpy(), atol=1e-5)
    assert len(set(quality.tolist())) == 2

def test_what_a_head_model_does_not_have_is_one_line(checkpoint, tmp_path):
    with pytest.raises(InputError, match='^rewards of editreward: expected one of if, quality'):
        load_judge(f'editreward:{checkpoint}', rewards=('if', 'cc', 'quality'))
    with pytest.raises(InputError, match='^judge: expected editreward:CHECKPOINT'):
        load_judge('editreward:m@http://h/v1')
    with pytest.raises(InputError, match='^judge_options'): load_judge(f'hpsv3:{checkpoint}', concurrency=3)
    (tmp_path/'config.json').write_text((checkpoint/'config.json').read_text())
    with pytest.raises(InputError, match='expected a model that can be loaded|expected the weights'):
        load_judge(f'hpsv3:{tmp_path}', device='cpu')(sessions, images)

critique = """# Detailed Judgement
1. Text Faithfulness:
## Justification: done.
## Score: {0}
2. Image Faithfulness:
## Justification: kept.
## Score: {1}
3. Physical and Visual Quality:
## Score: 4.0
4. Text Rendering:
## Score: N/A
# Summary: fine. Score: 1"""

def test_rationalrewards_behind_a_server():
    with Scripted(lambda request: critique.format(3.4, 2.5)) as server:
        judge = load_judge(f'rationalrewards:m@{server.url}')
        scores = judge(sessions, images)
    assert scores.names == ('if', 'cc')
    assert scores.rewards_PGTM[..., 0].unique().tolist() == pytest.approx([.8])
    assert scores.rewards_PGTM[..., 1].unique().tolist() == pytest.approx([.5])

def test_agreement_takes_reward_models(checkpoint):
    with Scripted(lambda request: '{"reasoning": "a "quote" in it", "score": [20, 5]}') as server:
        for aspect, expected in (('if', .8), ('cc', .2)):
            items = session_labels(sessions, images, aspect).items
            judge = load_judge(f'editscore:m@{server.url}')
            opinions = ask_repeatedly(judge.mode, judge.engine, items, judge.prompts, 1)
            assert opinions.scores_RQ[0].tolist() == pytest.approx([expected]*len(items))
    judge = load_judge(f'editreward:{checkpoint}', device='cpu')
    items = session_labels(sessions, images, 'if').items
    assert not np.isnan(ask_repeatedly(judge.mode, judge.engine, items, judge.prompts, 1).scores_RQ).any()

# --- UnifiedReward-Edit: one answer, a list of success and of how little else was changed, from 0 to 25 each

template = '{{\n\n"reasoning" : "{0}",\n"score" : {1},\n}}'          # its authors' own, with the comma at the end
unified = [
    (template.format('The ring is red now, and the rest is as it was.', '[25, 20]'), [1, .8]),
    ('```json\n' + template.format('A line\nbreak, and 3 of 4 objects kept.', '[5.0, 0]') + '\n```', [.2, 0]),
    ('{"reasoning": "He said: [1, 2]?", "score": ["20", "10"]}', [.8, .4]), ('[15, 25]', [.6, 1]),
    ('{"reasoning": "too much", "score": [26, 5]}', [None, .2]), ('{"reasoning": "no", "score": [25]}', [None, None]),
    ('{"reasoning": "cut off in the mid', [None, None])]

@pytest.mark.parametrize('answer, expected', unified, ids=range(len(unified)))
def test_unifiedreward_gives_both_rewards_in_one_answer(answer, expected):
    "What cannot be read is missing by itself: no zero, and no more than that one."
    with Scripted(lambda request: answer) as server:
        judge = load_judge(f'unifiedreward:m@{server.url}', max_failed=1)
        scores = judge(sessions, images)
    assert scores.names == ('if', 'cc') and judge.joint
    want = torch.tensor([np.nan if x is None else x for x in expected], dtype=torch.float32)
    torch.testing.assert_close(scores.rewards_PGTM, want.expand(1, 2, 2, 2), equal_nan=True)
    right = np.nan if expected[0] is None else float(expected[0] >= .75)
    torch.testing.assert_close(scores.success_PGT, torch.full((1, 2, 2), right), equal_nan=True)
    torch.testing.assert_close(scores.object_cc_PGT, want[1].expand(1, 2, 2), equal_nan=True)
    if expected[1] is not None: assert len(server.requests) == 4                      # members x turns, not twice that

def test_unifiedreward_is_shown_the_turns_input_and_its_result():
    "Two pictures and this turn's instruction; the scale that its authors ask for stands in the words."
    with Scripted(lambda request: '{"reasoning": "", "score": [25, 25]}') as server:
        load_judge(f'unifiedreward:m@{server.url}', concurrency=1)(sessions, images[:, :1])
        requests = server.requests
    assert [request['model'] for request in requests] == ['m', 'm']
    shown = [[part['image_url']['url'] for part in request['messages'][0]['content'][:-1]] for request in requests]
    assert shown[0][1] == shown[1][0] and len(shown[0]) == len(shown[1]) == 2        # turn 2 begins where turn 1 ended
    for text, instruction in zip((r['messages'][0]['content'][-1]['text'] for r in requests), sessions[0].instructions):
        assert instruction in text and '0 to 25' in text

def test_as_many_weights_as_rewards():
    "Refused before anything is sampled; the default has two."
    judge = 'hpsv3:MizzenAI/HPSv3'
    with pytest.raises(InputError, match='^weights: expected a number for each reward of hpsv3:.*, quality; or null'):
        make_config(dict(judge=judge))
    with pytest.raises(InputError, match='^weights: expected a number for each reward of verifier, if and cc'):
        make_config(dict(weights=[1.]))
    for weights in ([2.], None): assert make_config(dict(judge=judge, weights=weights)).weights == weights
