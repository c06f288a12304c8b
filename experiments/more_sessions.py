"""How much consistency does a method cost? The adapters of a finished sweep on more held-out sessions than it had:

    python experiments/more_sessions.py runs/sweeps/imitation_fresh.json self-imitation

2,048 sessions of three turns that no run has seen, so that a change of CC is known to a point, where 512 leave it open
by two. Every evaluation is kept in its run's folder and is not made again. Writes what was found into
experiments/results/more_sessions.json, beside what it holds of other settings."""
import argparse
from pathlib import Path
import torch
from overshoot import changes, scaled_outcomes, stacked
from tqdm.auto import tqdm
from mt_editflow_nb.ablation.results import load_results
from mt_editflow_nb.data.files import atomic_write, expect, read_json, to_json

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('sweep', type=Path, help='NAME.json of a sweep that the exact verifier scores')
    parser.add_argument('label', help='one of its settings')
    parser.add_argument('--sessions', type=int, default=2048, help='(default: %(default)s)')
    parser.add_argument('--eval-seed', type=int, default=6, help='which ones (default: %(default)s)')
    parser.add_argument('--results', type=Path, default=Path(__file__).resolve().parent/'results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    points = load_results(args.sweep).points
    expect(args.label in points, 'label', f'one of {", ".join(points)}', args.label)
    described, = [p for p in read_json(args.sweep)['points'] if p['label'] == args.label]
    runs = {job['seed']: args.sweep.parent/job['folder'] for job in described['jobs']}
    seeds = points[args.label].seeds
    name = f'{args.sessions}_of_{args.eval_seed}.safetensors'
    chosen = dict(n=args.sessions, turns=3, eval_seed=args.eval_seed)
    before = scaled_outcomes(runs[seeds[0]], 0, runs[seeds[0]]/f'before_{name}', **chosen)   # without the adapter
    after = [scaled_outcomes(runs[seed], 1, runs[seed]/f'after_{name}', **chosen)
             for seed in tqdm(seeds, desc='seeds')]
    of_all, of_seeds = changes(stacked([before]*len(seeds)), stacked(after))
    found = dict(sweep=args.sweep.stem, sessions=args.sessions, eval_seed=args.eval_seed, seeds=seeds, turn=3,
                 change=of_all, of_seeds=of_seeds)
    file = args.results/'more_sessions.json'
    known = read_json(file) if file.is_file() else {}
    atomic_write(file, to_json(known | {args.label: found}, indent=1))
    print(found)

if __name__ == '__main__': main()
