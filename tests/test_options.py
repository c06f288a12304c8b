"Options of rollouts and evaluations reach what they are about, and leave the rest alone."
import numpy as np, pytest, torch
from safetensors.torch import load_file
from test_families import judge
from test_training import adapter, small
from mt_editflow_nb.algorithm import iterate as page
from mt_editflow_nb.algorithm.as_judged import iterate_as_judged
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.cli.eval_options import check_options, eval_parser, fill_bench_settings, fill_settings
from mt_editflow_nb.data.files import InputError, atomic_write, to_json
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.evaluation import running
from mt_editflow_nb.rewards.cube import verifier
from mt_editflow_nb.training.budget import plan
from mt_editflow_nb.training.train import experiment

few = small | dict(iterations=1, turns=1, num_steps=4, min_std=0., std='group')

def noting(monkeypatch, module):
    "Which rollouts a module makes: (solver, size, denoising steps)."
    made = []
    rollout = module.rollout
    def noted(editor, sessions, **kw):
        made.append((kw['kind'], editor.size, kw['num_steps']))
        return rollout(editor, sessions, **kw)
    monkeypatch.setattr(module, 'rollout', noted)
    return made

def test_second_order_solver(tmp_path, monkeypatch):
    "NFT samples and is evaluated by it, `mtef_eval` does the same; GRPO has no use for it."
    trained, evaluated = (noting(monkeypatch, module) for module in (page, running))
    experiment(make_config(few | dict(sampler='dpm2')), tmp_path/'run', judge, progress=False)
    assert trained == [('dpm2', 48, 4)] and evaluated == [('dpm2', 48, 4)]*2
    for argv, expected in (([], 'dpm2'), (['--sampler', 'ode'], 'ode')):
        args = eval_parser().parse_args(['--lora', str(tmp_path/'run'/'lora'), *argv])
        fill_settings(args)
        assert args.sampler == expected
    with pytest.raises(InputError, match='sampler: expected another than dpm2, which has no stochastic steps'):
        make_config(dict(sampler='dpm2', algorithm='grpo'))
    with pytest.raises(InputError, match='sampler: expected algorithm=grpo'): make_config(dict(sampler='cps'))

def test_evaluation_at_another_size(tmp_path, monkeypatch, capsys):
    "The held-out pictures are made at that size from the first ones on, the rollouts at training's; it is said."
    trained, evaluated = (noting(monkeypatch, module) for module in (page, running))
    config = make_config(few | dict(iterations=2, eval_sessions=4, eval_size=64, eval_steps=3, eval_every=1))
    editor_size = experiment(config, tmp_path/'run', judge, progress=False)
    assert trained == [('flow', 48, 4)]*2 and evaluated == [('ode', 64, 3)]*3
    said = capsys.readouterr().err
    assert said.count('warning: evaluation: size: 64 here, but training used 48') == 1
    assert said.count('warning: evaluation: steps: 3 here, but training used 4') == 1
    for name in ('before', 'after'):
        assert load_file(tmp_path/'run'/f'{name}.safetensors')['images'].shape[-3:] == (64, 64, 3)
    assert editor_size['sessions'] == 4
    with pytest.raises(InputError, match='size: expected a multiple of 8'):
        experiment(make_config(few | dict(eval_size=50)), tmp_path/'other', judge, progress=False)
    with pytest.raises(InputError, match="eval_judge: expected MODEL:MODE .*works at 64.*received 'verifier'"):
        experiment(make_config(few | dict(eval_size=64)), tmp_path/'third', progress=False)

def test_benchmarks_keep_their_protocol_and_say_where_training_was_otherwise(tmp_path, capsys):
    "An adapter of 64 pixels, guidance 1, 6 steps and 4 bits, where nothing is asked for: what is published applies."
    def trained_with(**fields):
        atomic_write(tmp_path/'run/config.json', to_json(dict(config=dict(editor='tiny', sampler='flow') | fields)))
    def filled(fill, *argv):
        args = eval_parser().parse_args(['--lora', str(tmp_path/'run/lora'), *argv])
        fill(args)
        said = capsys.readouterr().err.replace('here, but training used', 'for')
        return (args.steps, args.size, args.guidance, args.quantize), [line.removeprefix('mtef_eval: warning: --')
                                                                       for line in said.splitlines()]
    edival = ['--sessions', 'edival', '--images', 'd']
    lme = ['--bench', 'lme', '--data', 'd', '--judge', 'm']
    trained_with(size=64, guidance=1., num_steps=6, quantize='nf4')
    otherwise = ['guidance: the default for 1.0', 'quantize: the default for nf4']
    assert filled(fill_settings, *edival) == ((28, None, None, None), [
        'size: the default for 64', otherwise[0], 'steps: 28 for 6', otherwise[1]])
    assert filled(fill_bench_settings, *lme) == ((30, 512, None, None), [
        'size: 512 for 64', otherwise[0], 'steps: 30 for 6', otherwise[1]])
    trained_with(size=None, guidance=2.5, num_steps=28, quantize=None)              # Kontext's own guidance
    assert filled(fill_settings, *edival)[1] == []
    for argv in (edival, lme):                                                      # both sample by Euler's steps alone
        with pytest.raises(InputError, match='^--sampler: expected'):
            check_options(eval_parser().parse_args([*argv, '--out', str(tmp_path), '--sampler', 'dpm2']))

def test_plan_of_an_evaluation_at_another_size():
    "Twice the side costs more than four times the operations in evaluation, and nothing else."
    a, b = (plan(make_config(few | dict(eval_size=size)), gpu='H100') for size in (None, 96))
    assert a['minutes'] == b['minutes'] and 4 < b['evaluation_hours']/a['evaluation_hours'] < 16

def test_merged_rollouts(tmp_path, monkeypatch):
    "The pictures of merged weights are those of the adapter, and so is what is learned; the weights stay."
    pictures = []
    page_rollout = page.rollout
    def noted(*args, **kw):
        pictures.append(page_rollout(*args, **kw))
        return pictures[-1]
    monkeypatch.setattr(page, 'rollout', noted)
    for name in ('apart', 'merged'):
        config = make_config(few | dict(iterations=2, merge=name == 'merged', lr=1e-2))
        experiment(config, tmp_path/name, judge, progress=False)
    for apart, merged in zip(pictures[:2], pictures[2:]):
        assert torch.allclose(apart.clean_TNLC, merged.clean_TNLC, atol=1e-3)
        assert np.abs(apart.images_PGTHWC.astype(int) - merged.images_PGTHWC).max() <= 1
    assert not torch.equal(pictures[1].clean_TNLC, pictures[3].clean_TNLC)       # it is another arithmetic
    a = adapter(tmp_path/'apart')
    b = adapter(tmp_path/'merged')
    moved = max(x.abs().max() for k, x in a.items() if 'lora_B' in k)
    assert moved > 1e-3 and all((a[k] - b[k]).abs().max() < .05*moved for k in a)

def test_attention_of_one_editor_is_not_that_of_others():
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    before, _ = registry.get_active_backend()
    editor = load_editor(attention_backend='_native_math')
    kernels = {m.processor._attention_backend for m in editor.transformer.modules() if hasattr(m, 'processor')}
    assert kernels == {'_native_math'} and registry.get_active_backend()[0] == before

@pytest.mark.parametrize('name,value', [('std', 'global'), ('whiten', True), ('fusion', 'adaptive'), ('keep', 2),
                                        ('updates', 2), ('branching', 'random'), ('lora_rank', None)])
def test_what_compares_sessions_waits_for_the_last_score(name, value):
    "Whoever asks for both gets one line that names the setting, before anything is loaded."
    fits = dict(learn_as_judged=True, std='group')
    assert make_config(fits).learn_as_judged
    more = dict(credit='local') if name == 'branching' else {}
    with pytest.raises(InputError, match='learn_as_judged') as e: make_config(fits | more | {name: value})
    assert '\n' not in str(e.value)

def test_rows_that_teach_nothing_are_not_counted_as_judged():
    "Half of the sessions get constant rewards: the mean is that of the others' rows, as in the plain iteration."
    sessions = shape_sessions(4, 1)
    config = make_config(few | dict(group=2, batch=2, sessions_per_iteration=4))
    def half(asked, images_PGTHWC):
        scores = verifier(asked, images_PGTHWC)
        for p, session in enumerate(asked):
            if session.id in (sessions[1].id, sessions[2].id): scores.rewards_PGTM[p] = .5
        return scores
    def learned(step, **settings):
        changed = config.model_copy(update=settings)
        return step(changed, Policy(changed, load_editor(lora_rank=changed.lora_rank)), sessions, half, 0)[0]
    plain = learned(page.iterate)
    early = learned(iterate_as_judged, learn_as_judged=True)
    assert plain['rows'] == early['rows'] == 4 and plain['passes'] == early['passes']
    assert early['grad_norm'] == pytest.approx(plain['grad_norm'], rel=1e-5)
    assert early['loss'] == pytest.approx(plain['loss'], rel=1e-5)
