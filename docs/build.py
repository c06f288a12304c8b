"""`make docs`: a site from the notebooks. nbdev prepares the chapters, Sphinx with myst-nb makes the pages.

Quarto, which nbdev calls by itself, is fetched from outside the package index; Sphinx is an ordinary requirement.
Chapters keep their code and their committed outputs; nothing is executed. The API pages show each public name with
its docments, rendered by nbdev."""
import importlib, re, shutil, subprocess, sys
from pathlib import Path
import nbformat
from nbdev import processors
from nbdev.process import NBProcessor
from nbdev.showdoc import BasicMarkdownRenderer, show_doc

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]
from readme import from_root  # noqa: E402
from test_notebooks import ROOMS, modules  # noqa: E402

source = root/'_proc'
site = root/'_docs'/'html'

STEPS = [processors.strip_ansi, processors.hide_line, processors.filter_stream_, processors.clean_magics,
         processors.hide_, processors.strip_hidden_metadata]      # of nbdev's own, those that execute nothing

def chapter(path):
    "A notebook as the site shows it: without hidden cells and directives, code and outputs as they are."
    book = NBProcessor(path, procs=STEPS)
    book.process()
    for cell in book.nb.cells:
        if cell.cell_type == 'code': cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
    cells = [c for c in book.nb.cells if c.source.strip() or c.get('outputs')]
    written = nbformat.from_dict(dict(book.nb, cells=[dict(c, metadata={}) for c in cells]))
    written.metadata.pop('widgets', None)      # a page has no kernel; every view carries a picture too
    for cell in written.cells:
        for extra in ('directives_', 'idx_', '_parsed_'): cell.pop(extra, None)
        if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if not is_widget(o)]
    return written

def is_widget(output):
    "Whether an output is nothing but a widget."
    kinds = set(output.get('data', {}))
    return bool(kinds) and kinds <= {'application/vnd.jupyter.widget-view+json', 'text/plain'} and len(kinds) == 2

def api_page(name):
    "Every public name of a module with its signature, docments and docstring."
    module = importlib.import_module('.'.join(('mt_editflow_nb', *name)))
    there = module.__name__
    public = [getattr(module, n) for n in module.__all__]
    documented = [x for x in public if callable(x) and getattr(x, '__module__', '') == there]
    entries = [show_doc(x, renderer=BasicMarkdownRenderer)._repr_markdown_() for x in documented]
    body = '\n'.join(entry.replace('---\n', '', 1).replace('\n###', '\n##') for entry in entries)
    return f'# `{there}`\n\n> {(module.__doc__ or "").strip()}\n\n{body}\n'

def front_texts(cell):
    "What the front page shows of a cell of the index: its text, or, of code, the text that came out."
    if cell.cell_type == 'markdown': return [cell.source]
    return [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {})]

def toctree(caption, pages):
    "A list of pages for the side bar."
    return '\n'.join([f'```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n:hidden:\n', *pages, '```', ''])

def write_sources():
    "What Sphinx reads: chapters, experiments, API pages, and a front page with the tree of all of them."
    shutil.rmtree(source, ignore_errors=True)
    for path in sorted((root/'nbs').rglob('*.ipynb')) + sorted((root/'experiments').glob('*.ipynb')):
        if path.name.startswith(('.', '_')): continue
        place = source/path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(chapter(path), place)
    shutil.copytree(root/'nbs'/'images', source/'nbs'/'images')
    shutil.copytree(root/'experiments'/'results', source/'experiments'/'results',
                    ignore=shutil.ignore_patterns('*.ipynb', '*.md'))
    for name in ('recipes', 'sweeps'): shutil.copytree(root/'experiments'/name, source/'experiments'/name)
    for path in (root/'experiments').glob('*.md'): shutil.copy(path, source/'experiments')
    shutil.copy(root/'LICENSE', source)
    for path in root.glob('*.md'):      # README.md is the front page here
        text = path.read_text().replace('README.md#dimension-letters', 'index.md#Dimension-letters')
        (source/path.name).write_text(text)
    for name in modules:
        page = source/'api'/f'{".".join(name)}.md'
        page.parent.mkdir(exist_ok=True)
        page.write_text(api_page(name))

    index = nbformat.read(source/'nbs'/'index.ipynb', as_version=4)
    front = '\n\n'.join(from_root(text) for c in index.cells for text in front_texts(c))
    # a folder has no page
    front = front.replace('](experiments/recipes)', '](experiments/recipes/kontext_nft.yaml)')
    (source/'nbs'/'index.ipynb').unlink()
    (source/'README.md').unlink()
    trees = [toctree('Start', ['nbs/tutorials/tour', 'CONTRIBUTING', 'CHANGELOG'])]
    for room in ROOMS:
        chapters = sorted(modules[name] for name in modules if name[0] == room)
        trees.append(toctree(room, [str(p.relative_to(root).with_suffix('')) for p in chapters]))
    tutorials = sorted(p for p in (root/'nbs'/'tutorials').glob('*.ipynb') if p.stem != 'tour')
    trees.append(toctree('tutorials', [str(p.relative_to(root).with_suffix('')) for p in tutorials]))
    experiments = sorted([*(root/'experiments').glob('*.ipynb'), *(root/'experiments').glob('*.md')])
    trees.append(toctree('experiments', [str(p.relative_to(root).with_suffix('')) for p in experiments]))
    names = ['.'.join(name) for name in sorted(modules, key=lambda n: ROOMS.index(n[0]))]
    trees.append(toctree('API', [f'{name} <api/{name}>' for name in names]))      # short, for the side bar
    (source/'index.md').write_text(front + '\n\n' + '\n'.join(trees))

def main():
    "Build the site; any warning, a broken internal link among them, is an error."
    write_sources()
    command = ['-m', 'sphinx', '-q', '-W', '--keep-going', '-c', str(root/'docs'), str(source), str(site)]
    code = subprocess.call([sys.executable, *command])
    if not code: print(f'open {site.relative_to(root)}/index.html')
    return code

if __name__ == '__main__': sys.exit(main())
