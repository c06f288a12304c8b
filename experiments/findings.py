"""Fill the tables of experiments/FINDINGS.md from what `mtef_report` wrote: python experiments/findings.py [--check]

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a folder of experiments/results/sweeps. With --check
nothing is written, and the exit status is 1 if a table in the text is not the one of the files."""
import argparse, re, sys
from pathlib import Path
import pandas as pd
from mt_editflow_nb.ablation.report import last_turn
from mt_editflow_nb.data.files import InputError, atomic_write

here = Path(__file__).resolve().parent
results, text = here/'results'/'sweeps', here/'FINDINGS.md'

def table(name):
    "Markdown: every setting of a sweep against its baseline, at the last turn at which all have an overall score."
    folder = results/name
    try: t, scores, seen = (pd.read_csv(folder/f'{x}.csv') for x in ('comparisons', 'scores', 'monitor'))
    except OSError as e: raise InputError(f'{e.filename}: not there; run mtef_report first') from None
    last = last_turn(t[t.metric == 'O'].set_index('turn').difference)
    t = t[t.turn == last].set_index(['point', 'metric'])
    scores = scores[scores.turn == last].set_index('point')
    seen = seen.set_index('point').drop(columns='seeds')
    labels = ['before training', *(p for p in scores.index[1:] if p not in t.index), *t.index.unique('point')]       # then the baseline
    rows = [f'| at turn {last} | seeds | O | difference of O | p (Holm) | of IF | of CC | would have found | monitor |', '|---|--:|--:|---|--:|---|---|--:|---|']
    for p in labels:
        row = [p, str(int(scores.seeds[p])) if p in seen.index else '', f'{scores.O[p]:.1f}']
        if p in t.index:
            diff = lambda m: '{:+.1f} [{:+.1f}, {:+.1f}]'.format(*t.loc[(p, m), ['difference', 'low', 'high']])
            o = t.loc[(p, 'O')]
            row += [('**{}**' if o.p_holm < .05 else '{}').format(diff('O')), f'{o.p_holm:.3f}', diff('IF'), diff('CC'), f'{o.detectable:.1f}']
        else: row += ['']*5
        row += [', '.join(f'{n} {int(k)}' for n, k in seen.loc[p].items() if k) if p in seen.index else '']
        rows.append(f'| {" | ".join(row)} |')
    return '\n'.join(rows)

def filled(old):
    "The text with every table made anew."
    return re.sub(r'(<!-- table (\S+) -->\n).*?(<!-- end -->)', lambda m: f'{m[1]}\n{table(m[2])}\n\n{m[3]}', old, flags=re.S)

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--check', action='store_true', help='write nothing; exit with 1 if a table is out of date')
    a = ap.parse_args()
    old = text.read_text(encoding='utf-8')
    try: new = filled(old)
    except InputError as e: print(f'findings.py: {e}', file=sys.stderr); sys.exit(2)
    if a.check: sys.exit(new != old)
    atomic_write(text, new)
