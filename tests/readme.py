"`python tests/readme.py` renders README.md from nbs/index.ipynb; test_notebooks.py checks that they agree."
import posixpath, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def from_root(markdown):
    "Relative links start from nbs/ in the notebook and from the top in README.md; code stays as it is."
    parts = re.split(r'(```.*?```|`[^`]*`)', markdown, flags=re.S)
    link = re.compile(r'(\]\(|src="|href=")(?![a-z]+:|#|/)([^)"\s]+)')
    parts[::2] = [link.sub(lambda m: m[1] + posixpath.normpath('nbs/' + m[2]), p) for p in parts[::2]]
    return ''.join(parts)

def render():
    "The text of README.md, and the pictures in the notebook's outputs by path."
    import nbformat
    from nbconvert import MarkdownExporter               # slow to import, for those who only want `root`
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\b', c.source)]
    for i, c in enumerate(nb.cells): # a cell that says so shows what it made, not how
        if re.match(r'#\|\s*echo:\s*false\b', c.source):
            shown = [o.data['text/markdown'] for o in c.outputs if 'text/markdown' in o.get('data', {})]
            nb.cells[i] = nbformat.v4.new_markdown_cell('\n\n'.join(shown))
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = from_root(c.source)
        for o in c.get('outputs', []): # the notebook viewer's table style is plain text on GitHub
            data = o.get('data', {})
            if 'text/html' in data: data['text/html'] = re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S)
    where = {'unique_key': 'index', 'output_files_dir': 'nbs/images'}
    text, resources = MarkdownExporter().from_notebook_node(nb, where)
    return text.strip() + '\n', resources['outputs']

if __name__ == '__main__':
    text, pictures = render()
    (root/'README.md').write_text(text, encoding='utf-8')
    for path, data in pictures.items():
        (root/path).parent.mkdir(exist_ok=True)
        (root/path).write_bytes(data)
