"""How much of a gradient is signal, by credit, fusion, members and stage of a run:

    python experiments/gradient_signal.py measure --folder runs/signal [--stages base 20 60] [--batches 64]
    python experiments/gradient_signal.py report --folder runs/signal

`measure` trains once (60 iterations, adaptive fusion, return to go) to have stages, then draws batches of 8 training
sessions and 8 members, as chains and with turn branching, and keeps the rewards and a sketch of the NFT gradient of
every row and turn at every noise level, for chains with two draws of noise, a file a batch; what is there is not made
again. `report` compares rules of credit, noise levels, draws and rewards on what is kept, and writes
experiments/results/signal.jsonl, a line a cell. Before training an adapter's second matrices are zero, so that they
alone have a gradient there; later the first ones have one, too."""
import argparse
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
from safetensors.torch import load_file, save_file
from mt_editflow_nb.algorithm.config import make_config
from mt_editflow_nb.algorithm.credit import draw_members
from mt_editflow_nb.algorithm.imitation import member_scores
from mt_editflow_nb.algorithm.iterate import iterate, turn_advantages
from mt_editflow_nb.algorithm.policy import Policy
from mt_editflow_nb.data.files import atomic_write, expect, to_json
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.lora import load_lora, save_lora
from mt_editflow_nb.editing.noise import choose_levels, normal_noise, random_generator
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.rewards.cube import TurnScorer, load_judge

P = 8
G = 8
T = 3
SKETCH = 2048
DRAWS = dict(chains=2, branching=1)                                   # of noise for training, a level
STRUCTURES = ('chains', 'branching', 'best')                          # the last for the ceiling of rewards alone
FIRST_SESSION = 100_000                                               # far from those that the run is trained on
RULES = {'paper': dict(fusion='advantage', credit='broadcast'),
         'broadcast, adaptive': dict(fusion='adaptive', credit='broadcast', std='none'),
         'to go, adaptive': dict(fusion='adaptive', credit='to_go', std='none'),
         'local, adaptive': dict(fusion='adaptive', credit='local', std='none'),
         'local, sum': dict(fusion='reward', credit='local', std='none'),
         'until failure (Edit-R2)': dict(aggregation='none', fusion='reward', credit='until_failure')}
BRANCHING_RULES = {name: RULES[name] for name in ('local, adaptive', 'local, sum', 'to go, adaptive')}

def make_stages(folder, stages):
    "Adapters after some iterations of one run; made again from its start when cut."
    wanted = [int(s) for s in stages if s != 'base']
    if all((folder/f'stage_{i}').is_dir() for i in wanted): return
    config = make_config(dict(iterations=60, **RULES['to go, adaptive']))
    policy = Policy(config, load_editor(lora_rank=config.lora_rank))
    judge = load_judge('verifier')
    for i in range(max(wanted)):
        iterate(config, policy, shape_sessions(P, T, start=P*i), judge, i)
        if i + 1 in wanted: save_lora(policy.editor, folder/f'stage_{i + 1}')

class RowGradients:
    "While it is open, a backward pass adds to `sketch_NX` the gradient of each row's loss, in random buckets."
    def __init__(self, editor):
        adapted = [(n, m) for n, m in editor.transformer.named_modules() if 'lora_' in n and hasattr(m, 'weight')]
        self.modules = [m for _, m in sorted(adapted, key=lambda x: x[0])]
        generator = torch.Generator().manual_seed(0)
        sizes = [m.weight.numel() for m in self.modules]
        self.buckets = [torch.randint(SKETCH, (n,), generator=generator) for n in sizes]
        self.signs = [torch.randint(2, (n,), generator=generator)*2. - 1 for n in sizes]

    def __enter__(self):
        def listen(i, module):
            def forward(module, inputs, output): module.seen = inputs[0].detach()
            def backward(module, grad_inputs, grad_outputs): self.add(i, module.seen, grad_outputs[0])
            return module.register_forward_hook(forward), module.register_full_backward_hook(backward)
        self.hooks = [hook for i, module in enumerate(self.modules) for hook in listen(i, module)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks: hook.remove()

    def add(self, i, seen, gradient):
        seen, gradient = (x.reshape(len(x), -1, x.shape[-1]) for x in (seen, gradient))
        each = torch.einsum('nlo,nli->noi', gradient, seen).flatten(1)
        self.sketch_NX.index_add_(1, self.buckets[i], each*self.signs[i])

    def of(self, editor, x0, xt, s, text, image):
        "Sketches of the gradients of NFT's loss for an advantage of 1, before the first update, [N, X]."
        self.sketch_NX = torch.zeros(len(x0), SKETCH)
        off = xt - s[:, None, None]*editor.velocity(xt, s, text, image) - x0
        weight = off.detach().abs().mean((1, 2)).clamp(min=1e-5)
        ((off**2).mean((1, 2))/weight).sum().backward()
        return self.sketch_NX

def draw_best(scorer, turn, keys):
    "Of the members with the best weighted score of a turn, one at random, [P]."
    score_PG = member_scores(make_config({}), scorer.of_turn(turn))[..., 0]
    best_PG = (score_PG == score_PG.amax(1, keepdim=True)).double()
    uniform_P = torch.tensor([random_generator(*key, 'goes on', turn).random() for key in keys])
    return (best_PG.cumsum(1) <= uniform_P[:, None]*best_PG.sum(1, keepdim=True)).sum(1)

def measure_batch(editor, structure, b, with_gradients=True):
    "Rewards, success and sketches of the gradients of a batch."
    num_steps = make_config({}).num_steps
    sessions = shape_sessions(P, T, start=FIRST_SESSION + P*b)
    with TurnScorer(load_judge('verifier'), sessions, G, every_turn=True) as scorer:
        choose = dict(chains=None, branching=partial(draw_members, group=G), best=partial(draw_best, scorer))[structure]
        made = rollout(editor, sessions, group=G, num_steps=num_steps, seed=1, iteration=b, on_turn=scorer,
                       choose=choose)
        scores = scorer.scores(made.images_PGTHWC)
    kept = dict(rewards_PGTM=scores.rewards_PGTM, success_PGT=scores.success_PGT)
    if made.chosen_PT is not None: kept['goes_on_PT'] = made.chosen_PT     # the name in files that are there
    if not with_gradients: return kept
    levels_TP = torch.stack([choose_levels([(*key, 'train', t) for key in made.keys], num_steps, 1)[0]
                             for t in range(T)])
    sketch_DKPGTX = measure_sketches(editor, made, DRAWS[structure])
    return kept | dict(level_PT=levels_TP.T.contiguous(), sketch_DKPGTX=sketch_DKPGTX)

def measure_sketches(editor, made, draws):
    "Sketches of every row at every noise level, [draws, levels, P, G, T, X], in half precision."
    levels = len(made.sigmas) - 1
    sketch_DKTNX = torch.zeros(draws, levels, T, P*G, SKETCH, dtype=torch.half)
    with RowGradients(editor) as gradients:
        for d, k, t in product(range(draws), range(levels), range(T)):
            keys = [(*key, 'train', t, d) for key in made.keys]
            x0 = made.clean_TNLC[t]
            noise_PLC = normal_noise(keys, editor.latent_shape)
            sigma_N = made.sigmas[k].expand(P*G)
            s = sigma_N[:, None, None]
            xt = (1 - s)*x0 + s*noise_PLC.repeat_interleave(G, 0)
            sketch_DKTNX[d, k, t] = gradients.of(editor, x0, xt, sigma_N, made.texts_T[t], made.inputs_TNLC[t]).half()
    return sketch_DKTNX.movedim(2, 3).unflatten(2, (P, G))

def chosen_levels(kept):
    "The sketch of each row and turn at the noise level that training would have drawn, first draw, [P, G, T, X]."
    index = kept['level_PT'][None, :, None, :, None].expand(1, P, G, T, SKETCH)
    return kept['sketch_DKPGTX'][0].gather(0, index)[0]

def measure(folder, stages, batches):
    "All cells that are not there yet."
    make_stages(folder, stages)
    for b, stage, structure in product(range(batches), stages, STRUCTURES):     # batch by batch: useful when cut
        file = folder/'batches'/stage/structure/f'{b:04d}.safetensors'
        if file.is_file() or structure == 'best' and b >= 8: continue
        editor = editor_at(folder, stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        tmp = file.with_suffix('.tmp')
        save_file({k: x.contiguous() for k, x in measure_batch(editor, structure, b, structure != 'best').items()}, tmp)
        tmp.replace(file)

_editors = {}
def editor_at(folder, stage):
    "The editor of a stage, loaded once."
    if stage not in _editors:
        editor = _editors[stage] = load_editor(**({} if stage != 'base' else dict(lora_rank=16)))
        if stage != 'base': load_lora(editor, folder/f'stage_{stage}')
        for name, p in editor.transformer.named_parameters(): p.requires_grad_('lora_' in name)
    return _editors[stage]

def mean_sketch(kept, levels, draws):
    "The mean sketch of each row and turn over some noise levels and draws of noise, [P, G, T, X]."
    return kept['sketch_DKPGTX'][:draws, list(levels)].float().mean((0, 1))

def add_what_follows(rewards_PGTM, chosen_PT):
    """Turn branching: the chosen member is also paid what followed, the siblings' mean rewards of later turns.

    What would have followed the others is not known; the mean over sessions takes its place."""
    mean_PTM = rewards_PGTM.mean(1)
    value_PTM = mean_PTM.flip(1).cumsum(1).flip(1) - mean_PTM
    expected_TM = value_PTM.mean(0)
    paid_PGTM = rewards_PGTM + expected_TM
    p = torch.arange(len(chosen_PT))[:, None]
    paid_PGTM[p, chosen_PT, torch.arange(chosen_PT.shape[1])] += (value_PTM - expected_TM)[:, :-1]
    return paid_PGTM

def batch_gradients(batches, rule, members, branching, sketch=chosen_levels):
    "Gradients of groups of some members, [batches, groups of them out of 8, X], and the share of turns that count."
    follows = branching and rule['credit'] == 'to_go'
    config = make_config(rule | dict(credit='local') if follows else rule)
    gradients = []
    counted = []
    for kept, first in product(batches, range(0, G, members)):
        part = slice(first, first + members)
        names = ('rewards_PGTM', 'success_PGT')
        scores = SimpleNamespace(**{name: kept[name][:, part] for name in names})
        if follows: scores.rewards_PGTM = add_what_follows(scores.rewards_PGTM, kept['goes_on_PT'])
        A_PGT = turn_advantages(config, scores).clamp(-config.adv_max, config.adv_max)
        sketch_PGTX = sketch(kept)[:, part].float()
        gradients.append(torch.einsum('pgt,pgtx->x', A_PGT, sketch_PGTX)/A_PGT.numel())
        counted.append((A_PGT != 0).float().mean())
    return torch.stack(gradients).double().unflatten(0, (len(batches), -1)), torch.stack(counted).mean().item()

def signal_to_noise(gradient_BKX):
    """Squared norm of the mean gradient over the variance of one, without bias, and its jackknife error over batches.

    Only gradients of different batches are multiplied: groups of one batch have the same sessions."""
    B, K, _ = gradient_BKX.shape
    product_BB = torch.einsum('bkx,cjx->bc', gradient_BKX, gradient_BKX)/K**2
    product_BB.fill_diagonal_(0)
    square_B = (gradient_BKX**2).sum(-1).mean(1)
    def estimate(products, squares, batches):
        "From the sum of all products, and of all squares."
        signal = products/(batches*(batches - 1))
        return signal/(squares/batches - signal)
    snr = estimate(product_BB.sum(), square_B.sum(), B)
    without_B = estimate(product_BB.sum() - 2*product_BB.sum(1), square_B.sum() - square_B, B - 1)
    return snr.item(), ((B - 1)*without_B.var(correction=0)).sqrt().item()

def cosine_of_halves(gradient_BX):
    "Mean cosine between the mean gradients of two random halves of the batches."
    generator = torch.Generator().manual_seed(0)
    cosines = []
    for _ in range(100):
        order = torch.randperm(len(gradient_BX), generator=generator)
        halves = [gradient_BX[half].mean(0) for half in order.chunk(2)]
        cosines.append(torch.cosine_similarity(*halves, 0).item())
    return float(np.mean(cosines))

def inner_of_means(a_BX, b_BX):
    "Inner product of the expectations of two estimates on the same batches, without the bias of their noise."
    B = len(a_BX)
    products = a_BX@b_BX.T
    return (products.sum() - products.diagonal().sum()).item()/(B*(B - 1))

def cosine_of_means(a_BX, b_BX):
    """Cosine between the expectations of two estimates on the same batches, without the bias of their noise.

    None where one of them is lost in its noise."""
    for x in (a_BX, b_BX):
        snr, error = signal_to_noise(x[:, None])
        if snr < 2*error: return None
    lengths = inner_of_means(a_BX, a_BX)*inner_of_means(b_BX, b_BX)
    return inner_of_means(a_BX, b_BX)/lengths**.5

def strength(gradient_BKX, passes):
    "How much of a gradient is signal, alone and per 1,000 passes, with its jackknife error."
    snr, error = signal_to_noise(gradient_BKX)
    return dict(batches=len(gradient_BKX), snr=snr, snr_error=error,
                snr_per_1000_passes=1000*snr/passes, error_per_1000_passes=1000*error/passes)

def rule_rows(batches_of, stage):
    "Rules of credit and fusion, and numbers of members, at levels of noise that are drawn as training draws them."
    reference_BX = batch_gradients(batches_of['chains'], RULES['broadcast, adaptive'], G, False)[0][:, 0]
    for structure, rules in (('chains', RULES), ('branching', BRANCHING_RULES)):
        for (name, rule), members in product(rules.items(), (8, 4, 2)):
            if structure == 'branching' and rule['credit'] == 'to_go' and members < G: continue
            gradient_BKX, counted = batch_gradients(batches_of[structure], rule, members, structure == 'branching')
            passes = P*members*T*(3 + 3)        # three denoising steps, and forward plus backward counted as three
            row = dict(what='rule', stage=stage, structure=structure, rule=name, members=members, counted=counted,
                       cosine_of_halves=cosine_of_halves(gradient_BKX[:, 0]), **strength(gradient_BKX, passes))
            if members == G: row['cosine_with_broadcast'] = cosine_of_means(gradient_BKX[:, 0], reference_BX)
            yield row

def level_rows(batches_of, stage):
    "Levels of noise that are trained at, and draws of noise at each; level 0 is pure noise."
    for structure, draws, levels in product(DRAWS, (1, 2), ((0,), (1,), (2,), (0, 1), (0, 1, 2))):
        if draws > DRAWS[structure]: continue
        branching = structure == 'branching'
        sketch = partial(mean_sketch, levels=levels, draws=draws)
        gradient_BKX, _ = batch_gradients(batches_of[structure], RULES['local, adaptive'], G, branching, sketch)
        alike = branching and levels == (0,)                                # a row trained for all members of a group
        passes = P*T*(G*3 + 3*len(levels)*draws*(1 if alike else G))
        yield dict(what='level', stage=stage, structure=structure, levels=levels, draws=draws,
                   **strength(gradient_BKX, passes))

def reward_rows(batches_of, stage):
    "What each reward asks for, alone and weighed against the other, with turn branching at pure noise."
    sketch = partial(mean_sketch, levels=(0,), draws=1)
    passes = P*T*(G*3 + 3)
    def asked(weights):
        rule = dict(fusion='reward', credit='local', std='none', weights=weights)
        return batch_gradients(batches_of['branching'], rule, G, True, sketch)[0]
    alone = {name: asked(weights) for name, weights in (('if', [1, 0]), ('cc', [0, 1]))}
    cosine = cosine_of_means(*(x[:, 0] for x in alone.values()))
    for name, gradient_BKX in (*alone.items(), *((f'.{w}, .{10 - w}', asked([w/10, 1 - w/10])) for w in (1, 3, 5))):
        square = inner_of_means(gradient_BKX[:, 0], gradient_BKX[:, 0])
        yield dict(what='reward', stage=stage, reward=name, norm=max(square, 0)**.5, cosine_of_rewards=cosine,
                   **strength(gradient_BKX, passes))

def report_stage(folder, stage):
    "Yields a row for each cell of a stage."
    def read(structure): return [load_file(f) for f in sorted((folder/'batches'/stage/structure).glob('*.safetensors'))]
    batches_of = {structure: read(structure) for structure in STRUCTURES}
    together = min(len(batches_of[structure]) for structure in DRAWS)
    expect(together >= 4 and batches_of['best'], f'{folder}: {stage}', 'at least 4 batches of each kind', together)
    for structure in DRAWS: batches_of[structure] = batches_of[structure][:together]
    for rows in (rule_rows, level_rows, reward_rows): yield from rows(batches_of, stage)
    yield dict(what='groups', stage=stage, **group_facts(batches_of['chains']))
    yield dict(what='ceiling', stage=stage, **ceiling(batches_of['best']))

def group_facts(batches):
    "Of groups of 8 at each turn: all members right, all wrong, and no spread in the graded rewards."
    success_PGT = torch.cat([b['success_PGT'] for b in batches])
    spread_PTM = torch.cat([b['rewards_PGTM'] for b in batches]).std(1, correction=0)
    return dict(sessions=len(success_PGT), success=success_PGT.mean((0, 1)).tolist(),
                all_right=(success_PGT == 1).all(1).float().mean(0).tolist(),
                all_wrong=(success_PGT == 0).all(1).float().mean(0).tolist(),
                no_spread=(spread_PTM < 1e-3).all(-1).float().mean(0).tolist())

def ceiling(batches):
    "The best of 8 going on at every turn: share of sessions all right so far, and cc, of the chosen member."
    right = []
    kept = []
    for b in batches:
        best_PT = (b['rewards_PGTM']@torch.tensor([.35, .65])).argmax(1)[:, None]
        right.append(b['success_PGT'].gather(1, best_PT)[:, 0].cumprod(-1))
        kept.append(b['rewards_PGTM'][..., 1].gather(1, best_PT)[:, 0])
    right_PT = torch.cat(right)
    error = (right_PT.mean(0)*(1 - right_PT.mean(0))/len(right_PT)).sqrt()
    return dict(sessions=len(right_PT), all_right=right_PT.mean(0).tolist(), error=error.tolist(),
                cc=torch.cat(kept).mean(0).tolist())

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['measure', 'report'])
    parser.add_argument('--folder', type=Path, default=Path('runs/signal'))
    parser.add_argument('--stages', nargs='+', default=['base', '20', '60'])
    parser.add_argument('--batches', type=int, default=64)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.what == 'measure': return measure(args.folder, args.stages, args.batches)
    rows = [row for stage in args.stages for row in report_stage(args.folder, stage)]
    file = Path(__file__).resolve().parent/'results'/'signal.jsonl'
    atomic_write(file, ''.join(f'{to_json(row)}\n' for row in rows))

if __name__ == '__main__': main()
