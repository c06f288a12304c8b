"""How far choosing alone would come: at every turn the best of several samples is kept, and the next turn edits it:

    python experiments/ceiling.py [--samples 1 8] [--lora FOLDER]

The exact judge of the shape world chooses, first by success, then by consistency, on the 512 held-out sessions of the
comparison at equal passes, so that one sample gives its scores before training. Adds a line a row to
experiments/results/ceiling.jsonl; one that is there is not made again."""
import argparse
from pathlib import Path
import torch
from tqdm.auto import tqdm
from mt_editflow_nb.data.files import append_json_line, log_rows
from mt_editflow_nb.data.shapeworld import shape_sessions
from mt_editflow_nb.editing.loading import load_editor
from mt_editflow_nb.editing.rollout import rollout
from mt_editflow_nb.evaluation.scores import edival_scores
from mt_editflow_nb.rewards.cube import TurnScorer, load_judge

HELD_OUT = 512    # these four as recipe.yaml has them
TURNS = 8
SESSIONS = 2
STEPS = 3
NOISE = 1234                                          # as `evaluate` has it

def best_members(scores): # of one turn, [P, G, 1] each -> [P]
    "The member with the highest success, among equals the most consistent."
    consistency_PG = scores.rewards_PGTM[..., 0, scores.names.index('cc')].nan_to_num(0)
    return (2*scores.success_PGT[..., 0] + consistency_PG).argmax(1)

def best_of(editor, samples, batch=64):
    "EdiVal's scores in percent when the best of so many samples goes on, metric -> a number for each turn."
    judge = load_judge('verifier')
    parts = []
    sessions = shape_sessions(HELD_OUT, TURNS, 'heldout', seed=SESSIONS)
    for first in tqdm(range(0, HELD_OUT, batch), desc=f'best of {samples}'):
        some = sessions[first:first + batch]
        with TurnScorer(judge, some, samples, every_turn=True) as scorer:
            def choose(turn, keys): return best_members(scorer.of_turn(turn))
            made = rollout(editor, some, group=samples, num_steps=STEPS, seed=NOISE, on_turn=scorer, choose=choose)
            scores = scorer.scores(made.images_PGTHWC)
            kept_PT = torch.stack([best_members(scorer.of_turn(t)) for t in range(TURNS)], 1)
        fields = scores.success_PGT, scores.object_cc_PGT, scores.background_cc_PGT
        parts.append([x_PGT.gather(1, kept_PT[:, None])[:, 0].float() for x_PGT in fields])
    scores = edival_scores(*[torch.cat(x).numpy() for x in zip(*parts)])
    return {name: scores[name].round(2).tolist() for name in ('IF', 'marginal', 'CC', 'O')}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--lora', help='a trained adapter; none: the editor before training')
    parser.add_argument('--name', default='before training', help='what the rows are called')
    parser.add_argument('--results', type=Path, default=Path('experiments/results/ceiling.jsonl'))
    args = parser.parse_args()
    editor = load_editor(lora_rank=16, init_lora=args.lora) if args.lora else load_editor()
    known = [(row['name'], row['samples']) for row in log_rows(args.results)]
    for samples in args.samples:
        if (args.name, samples) in known: continue
        append_json_line(args.results, dict(name=args.name, samples=samples) | best_of(editor, samples))

if __name__ == '__main__': main()
