"""`python experiments/parameters.py` writes the parameters of ablation.ipynb from `Config`.

So every field has its type, default and explanation in one place."""
import json, types, typing
from pathlib import Path
from mt_editflow_nb.algorithm.config import CONFIG_PRESETS, Config

path = Path(__file__).resolve().parent/'ablation.ipynb'

def union(members):
    kinds = [kind(t) for t in members if t is not types.NoneType]
    inner = kinds[0] if len(kinds) == 1 else f'Union[{", ".join(kinds)}]'
    return f'Optional[{inner}]' if types.NoneType in members else inner

def kind(t):
    "The annotation as papermill reads it: choices are texts, and checked by the next cell."
    if typing.get_origin(t) in (typing.Union, types.UnionType): return union(typing.get_args(t))
    if typing.get_origin(t) is typing.Literal: return 'str'
    return t.__name__ if isinstance(t, type) and not typing.get_args(t) else str(t)

def source():
    lines = [("run: str = ''", 'folder of the run; empty: one in runs/ablation/ that is named by the configuration')]
    about = f'settings by name ({", ".join(CONFIG_PRESETS)}); what differs from the defaults overrides them'
    lines.append(('preset: Optional[str] = None', about))
    for name, f in Config.model_fields.items():
        kinds = (f.annotation, *typing.get_args(f.annotation))
        choices = next((typing.get_args(t) for t in kinds if typing.get_origin(t) is typing.Literal), ())
        listed = f' ({", ".join(choices)})' if len(choices) > 1 else ''
        lines.append((f'{name}: {kind(f.annotation)} = {f.default!r}', f.description + listed))
    wide = max(len(a) for a, _ in lines)
    return '\n'.join(f'{a:{wide}}  # {b}' for a, b in lines)

if __name__ == '__main__':
    nb = json.loads(path.read_text(encoding='utf-8'))
    cell, = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    cell['source'] = source().splitlines(keepends=True)
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
