"The notebooks are the source: what is generated from them agrees with them, and they read well anywhere."
import ast, json, re, shutil, subprocess, sys
from functools import lru_cache
import nbformat, pytest
from readme import render, root

lib = 'mt_editflow_nb'

def is_source(path):
    "Whether a notebook is one of ours: not a hidden file, and no executed report."
    return not any(part.startswith(('.', '_')) or part == 'results' for part in path.relative_to(root).parts)

found = sorted([*(root/'nbs').rglob('*.ipynb'), *(root/'experiments').rglob('*.ipynb')])
notebooks = [p for p in found if is_source(p)]
chapters = [p for p in notebooks if p.is_relative_to(root/'nbs')]
texts = [*sorted(root.glob('*.md')), *sorted((root/'experiments').glob('*.md'))]

def each(paths): return pytest.mark.parametrize('path', paths, ids=lambda p: str(p.relative_to(root)))

@lru_cache(None)
def notebook(path):
    "Read once for all tests, none of which changes anything in it; not validated, which takes most of the time."
    return nbformat.v4.reads(path.read_text(encoding='utf-8'))

def cells_of(path): return notebook(path).cells

def module_of(path):
    "The module that a notebook exports, as the parts of its name, or None."
    code = '\n'.join(c.source for c in cells_of(path) if c.cell_type == 'code')
    name = re.search(r'#\|\s*default_exp\s+(\S+)', code)
    return name and tuple(name[1].split('.'))

modules = {name: p for p in chapters if (name := module_of(p))}

def test_package_is_exported_from_notebooks(tmp_path):
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=shutil.ignore_patterns('.*', 'images'))
    shutil.copy(root/'settings.ini', tmp_path)
    (tmp_path/lib).mkdir()
    command = 'from nbdev.doclinks import nbdev_export; nbdev_export()'
    subprocess.run([sys.executable, '-c', command], cwd=tmp_path, check=True)

    def code(top):
        files = [p for p in (top/lib).rglob('*.py') if p.name not in ('__init__.py', '__main__.py')]   # by hand
        return {str(p.relative_to(top)): p.read_text() for p in files}

    exported = code(tmp_path)
    committed = code(root)
    assert exported.keys() == committed.keys()
    differ = [name for name in exported if exported[name] != committed[name]]
    assert not differ, f'run nbdev_export: {differ} differ from the notebooks'

@each(notebooks)
def test_valid_and_without_errors(path):
    nb = notebook(path)
    nbformat.validate(nb)
    assert nb.nbformat == 4
    errors = [o.ename for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
    assert not errors
    widgets = nb.metadata.get('widgets', {}) # without a state, GitHub says "Invalid Notebook"
    assert all('state' in w for w in widgets.values())

@each(notebooks)
def test_no_paths_of_one_machine(path):
    found = []
    for c in cells_of(path):
        texts = [c.source]
        for o in c.get('outputs', []):
            shown = [v for kind, v in o.get('data', {}).items() if not kind.startswith('image/')]
            texts += [o.get('text', ''), *map(json.dumps, shown)]
        for text in texts: # not the same words inside a URL or inline image
            found += re.findall(r'(?<![\w.~+/-])/(?:work|root|home|Users)/\S*', re.sub(r'base64,[\w+/=]+', '', text))
    assert not found

def test_readme_is_rendered_from_index():
    text, pictures = render()
    assert (root/'README.md').read_text(encoding='utf-8') == text, 'run make readme'
    for path, data in pictures.items(): assert (root/path).read_bytes() == data, f'run make readme: {path}'

def test_links_of_readme_exist():
    text = (root/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'(?:\]\(|src="|href=")(?![a-z]+:|#)([^)"#\s]+)', text)
    assert links
    missing = [link for link in links if not (root/link).exists()]
    assert not missing

def links_of_text(path): return re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', path.read_text(encoding='utf-8'))

@each(texts)
def test_links_of_texts_exist(path):
    missing = [link for link in links_of_text(path) if not (path.parent/link).exists()]
    assert not missing

@each(sorted((root/'experiments').glob('*.md')))
def test_pages_of_the_site_do_not_lead_to_folders(path):
    folders = [link for link in links_of_text(path) if (path.parent/link).is_dir()]
    assert not folders

@each(notebooks)
def test_links_between_files_exist(path):
    text = '\n'.join(c.source for c in cells_of(path) if c.cell_type == 'markdown')
    links = re.findall(r'(?:\]\(|src="|href=")(?![a-z]+:)([^)"#\s]+\.(?:ipynb|md|png|svg|jpg|gif|yaml))', text)
    missing = [link for link in links if not (path.parent/link).exists()]
    assert not missing

def anchors_of(path):
    "Of the headings of a text, those that GitHub and the site (which makes a hyphen of an apostrophe) give alike."
    titles = [title.lower() for title in re.findall(r'^#+ (.*)', path.read_text(encoding='utf-8'), re.M)]
    on_github = {re.sub(r'[^\w\- ]', '', title).replace(' ', '-') for title in titles}
    return on_github & {re.sub(r'[^a-z0-9]+', '-', title).strip('-') for title in titles}

@each([*notebooks, *texts])
def test_links_to_headings_of_texts_work_on_github_and_on_the_site(path):
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb': text = '\n'.join(c.source for c in cells_of(path) if c.cell_type == 'markdown')
    links = re.findall(r'\]\((?![a-z]+:)([^)#\s]+\.md)#([^)\s]+)\)', text)
    wrong = [f'{file}#{name}' for file, name in links if name not in anchors_of(path.parent/file)]
    assert not wrong

@each(chapters)
def test_begins_with_title_and_subtitle(path):
    cells = [c for c in cells_of(path) if c.cell_type != 'raw']
    found = re.match(r'# [^#\s].*\n+> (\S.*)', cells[0].source)
    assert cells[0].cell_type == 'markdown' and found
    assert len(found[1]) <= 120, 'the subtitle becomes a docstring of one line'

def without_magic(source):
    "Python without IPython's own lines."
    return re.sub(r'(?m)^(\s*)[%!].*', r'\1pass', source)

def prints(node):
    "Whether running it calls `print` or `display`; what it only defines does not count."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): return False
    shows = isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('print', 'display')
    return shows or any(map(prints, ast.iter_child_nodes(node)))

def test_printing_is_found():
    assert prints(ast.parse('for x in y: print(x)')) and not prints(ast.parse('def f(): print(1)\nf()'))

@each(chapters)
def test_cells_that_print_show_what_they_print(path):
    "An output is easily lost when a cell is edited."
    silent = [c.source for c in cells_of(path) if c.cell_type == 'code' and not c.outputs]
    shown = [source for source in silent if not re.search(r'#\|\s*(hide|export|eval)', source)]
    assert not [source for source in shown if prints(ast.parse(without_magic(source)))]

@each(notebooks)
def test_figures_are_pictures(path):
    "Without `%matplotlib inline` a figure that is a cell's value is the words <Figure size ...>."
    outputs = [o for c in cells_of(path) for o in c.get('outputs', ()) if 'data' in o]
    figures = [o.data for o in outputs if o.data.get('text/plain', '').startswith('<Figure ')]
    assert all('image/png' in data for data in figures)

@lru_cache(None)
def exported_cells(path):
    "(source, syntax tree) of the cells that a chapter exports."
    sources = [c.source for c in cells_of(path) if c.cell_type == 'code']
    return [(source, ast.parse(source)) for source in sources if re.search(r'(?m)^#\|\s*export\b', source)]

LINES = 40          # of an exported cell
CLASS_LINES = 58    # of one that is a class, which cannot be divided

def too_long(path):
    "Names of what the cells define that have too many lines; empty ones and nbdev's directives do not count."
    for source, tree in exported_cells(path):
        lines = [line for line in source.split('\n') if line.strip() and not line.startswith('#|')]
        defined = [node for node in tree.body if hasattr(node, 'name')]
        one_class = len(defined) == 1 and isinstance(defined[0], ast.ClassDef)
        if len(lines) > (CLASS_LINES if one_class else LINES): yield ', '.join(node.name for node in defined)

def python_of(path):
    "The Python of a file, or of each cell of a notebook without IPython's own lines."
    if path.suffix == '.py': return [path.read_text()]
    sources = [c.source for c in cells_of(path) if c.cell_type == 'code' and not c.source.startswith('%%')]
    return [without_magic(source) for source in sources]

def reads(value, target):
    "Whether a value reads what is assigned to a target before it, as where two things are swapped."
    assigned = {ast.unparse(part) for part in getattr(target, 'elts', [target])}
    return bool(assigned & {ast.unparse(node) for node in ast.walk(value)})

def several_assignments(source):
    "Lines that assign several values to several names, where one line each would do the same."
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple): continue
        targets = getattr(node.targets[0], 'elts', [])
        swaps = any(reads(value, target) for i, target in enumerate(targets) for value in node.value.elts[i + 1:])
        if targets and not swaps: yield ast.unparse(node)

def test_several_assignments_are_found():
    assert list(several_assignments('a, b = 1, 2\nc, d = f(x)\np.data, q.data = q.data, p.data')) == ['a, b = (1, 2)']
    assert list(several_assignments('self.a, self.b = x, self.c'))                     # another field is read

written = [*notebooks, *sorted((root/'tests').glob('*.py')), *sorted((root/'experiments').glob('*.py'))]

@each(written)
def test_one_assignment_a_line(path):
    assert not [line for source in python_of(path) for line in several_assignments(source)]

LINE = 120      # characters

def long_lines(source):
    "Lines that are too long, whatever they end with, but for the list of names that nbdev writes."
    return [line for line in source.split('\n') if len(line) > LINE and not line.startswith('__all__ = [')]

def test_long_lines_are_found():
    long = 'x = 1'.ljust(LINE) + '# noqa'
    assert long_lines(f"x = 1\n__all__ = [{long!r}]\n{long}") == [long]

def parameters_of(path):
    "The sources of the cells in which papermill looks for parameters, each of which is one line."
    return [c.source for c in cells_of(path) if 'parameters' in c.metadata.get('tags', [])]

package = sorted(p for p in (root/lib).rglob('*.py') if p.name != '_modidx.py')        # which nbdev writes

@each([*package, *written])
def test_lines_are_short(path):
    sources = python_of(path)
    if path.parent.name == 'experiments' and path.suffix == '.ipynb':
        sources = [source for source in sources if source not in parameters_of(path)]
    assert not [line for source in sources for line in long_lines(source)]

@pytest.mark.parametrize('name', modules, ids='.'.join)
def test_cells_are_short(name):
    assert not list(too_long(modules[name]))

def public_functions(tree, within=''):
    "(name, node) of public functions, and of public methods, `__init__` and `__call__` of public classes."
    for node in tree.body:
        special = isinstance(tree, ast.ClassDef) and getattr(node, 'name', '') in ('__init__', '__call__')
        if getattr(node, 'name', '_').startswith('_') and not special: continue
        if isinstance(node, ast.ClassDef): yield from public_functions(node, f'{node.name}.')
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)): yield within + node.name, node

def comment_columns(node, lines):
    "The column of every parameter's comment; None where there is none. What a caller does not pass is left out."
    a = node.args
    parameters = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    ends = {}
    for default, parameter in zip(reversed(a.defaults), reversed([*a.posonlyargs, *a.args])): ends[parameter] = default
    ends |= {parameter: default for parameter, default in zip(a.kwonlyargs, a.kw_defaults) if default}
    places = [(p, ends.get(p, p)) for p in parameters if p.arg not in ('self', 'cls') and not p.arg.startswith('_')]
    for parameter, end in places:
        rest = lines[end.end_lineno - 1].encode()[end.end_col_offset:].decode()
        alone = [p for p, e in places if e.end_lineno == end.end_lineno] == [parameter]
        found = re.match(r',?\s*(# \S)', rest)
        yield end.end_col_offset + found.start(1) if found and alone else None

def return_columns(node, lines):
    "The column of the comment behind the line that closes the parameters, if there is one."
    for line in lines[node.lineno - 1:node.body[0].lineno - 1]:
        closing = re.match(r'\s*\)( -> [^#]*)?:\s*(?=# \S)', line)
        if closing: yield closing.end()

def undocumented(path):
    "Public names without a docstring, or with parameters that lack a comment, or whose comments are not aligned."
    for source, tree in exported_cells(path):
        for name, node in public_functions(tree):
            if not ast.get_docstring(node) and node.name != '__init__': yield f'{name}: no docstring'
            if isinstance(node, ast.ClassDef): continue
            lines = source.split('\n')
            columns = set(comment_columns(node, lines))
            if None in columns: yield f'{name}: a parameter without a comment on its line'
            if columns: columns.update(return_columns(node, lines))
            if len(columns - {None}) > 1: yield f'{name}: comments that are not aligned'

@pytest.mark.parametrize('name', modules, ids='.'.join)
def test_public_names_are_documented(name):
    assert not list(undocumented(modules[name]))

@lru_cache(None)
def syntax_tree(name):
    "The syntax tree of a module of the package."
    return ast.parse(root.joinpath(lib, *name).with_suffix('.py').read_text())

def imported(name):
    "Modules of this package that a module imports, anywhere in it."
    for node in ast.walk(syntax_tree(name)):
        full = []
        if isinstance(node, ast.Import): full = [a.name.split('.') for a in node.names]
        if isinstance(node, ast.ImportFrom):
            start = [lib, *name][:-node.level] if node.level else []
            start += node.module.split('.') if node.module else []
            full = [start + [a.name] for a in node.names]
        for parts in full:
            if parts[0] != lib: continue
            used = [m for m in modules if tuple(parts[1:1 + len(m)]) == m]
            if used: yield max(used, key=len)

# in reading order
ROOMS = ('data', 'editing', 'rewards', 'algorithm', 'evaluation', 'training', 'ablation', 'explore', 'cli')

def place(name):
    "Where a chapter stands in reading order: its room, then its number and letter."
    return (ROOMS.index(name[0]), *re.match(r'(\d+)([a-z]*)_', modules[name].name).groups())

# errors that are about no value: where they are raised, their words, and what they are about
OTHER_ERRORS = [
    ('ablation.sweeps.check_point', '{}{}', "whatever somebody's own cell raises"),
    ('editing.editor.hub_errors', '{}: {} cannot be reached on the hub: {}', 'the network'),
    ('evaluation.bench_scores.ask_benchmark.ask',
     'judge: {}. What has been answered is kept; the same command goes on', 'a judge that stays away'),
    ('rewards.edival_tools.ToolsServer.call', 'judge: {}. What was done before is kept; go on when it is back',
     'a judge that stays away'),
    ('rewards.cube.Judge.score', 'judge: {}. What was done before is kept; go on when it is back',
     'a judge that stays away'),
    ('rewards.instructions.write_sessions', 'vlm: {}; what it said is kept', 'a judge that stays away'),
    ('rewards.servers.ask_server', 'judge: {} has no quota left: {}', 'an account'),
    ('training.checkpoints.write_checkpoint', 'checkpoint: cannot write {}: {}; the last good one is {}', 'a disk'),
    ('training.checkpoints._in_one_line', 'checkpoint: {}: process {}: {}', 'a disk, or what its caller says'),
    ('training.checkpoints._in_one_line', 'checkpoint: {}: {}', 'a disk, or what its caller says'),
    ('training.iteration_log.log_iteration', '{}: cannot be written ({})', 'a disk')]

def worded_errors(node, place, passed=()):
    "(place, words, values as {}) of the errors for users that have a text of their own and do not pass on another's."
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): place = f'{place}.{node.name}'
    if isinstance(node, ast.ExceptHandler) and node.type and ast.unparse(node.type) == 'InputError':
        passed = (*passed, node.name)
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ('InputError', 'JudgeFailed', 'KnownFault'):
        parts = getattr(node.args[0], 'values', node.args[:1])
        shown = [ast.unparse(part.value) for part in parts if isinstance(part, ast.FormattedValue)]
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        if len(shown) + len(texts) == len(parts) and not set(shown) & set(passed):
            yield place, ''.join(part.value if isinstance(part, ast.Constant) else '{}' for part in parts)
    for child in ast.iter_child_nodes(node): yield from worded_errors(child, place, passed)

def test_errors_say_what_was_expected_and_what_was_received():
    found = [error for name in modules for error in worded_errors(syntax_tree(name), '.'.join(name))]
    assert len(found) > 100
    others = {(place, words) for place, words in found if not re.search('.: expected .+, received .', words)}
    assert others == {(place, words) for place, words, _ in OTHER_ERRORS}

QUOTED = [     # texts that stand for what a user has written: quoted like every value
    ('algorithm.config.check_advantage', "'none'"), ('cli.eval_options.check_options', "args.judge or 'verifier'"),
    ('cli.eval_options.check_options', "args.sessions or 'shapeworld'"),
    ('rewards.cube._heads_judge', "f'{kind}:{model}'"),
    ('cli.train._chosen', "' '.join(args.settings) or f'--run {args.run}'"), ('cli.train._chosen', "f'{name}={value}'")]

def quoted_texts(node, place):
    "(function, source) of what `expect` is told was received, where that is a text of ours that it would quote."
    if isinstance(node, ast.FunctionDef): place = f'{place}.{node.name}'
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'expect' and len(node.args) == 4:
        received = node.args[3]
        parts = getattr(received, 'values', [received]) if isinstance(received, ast.BoolOp) else [received]
        if isinstance(received, ast.IfExp): parts = [received.body, received.orelse]
        if any(isinstance(x, ast.JoinedStr) or isinstance(getattr(x, 'value', None), str) for x in parts):
            yield place, ast.unparse(received)
    for child in ast.iter_child_nodes(node): yield from quoted_texts(child, place)

def test_errors_quote_what_was_written_and_not_how_we_describe_it():
    found = {text for name in modules for text in quoted_texts(syntax_tree(name), '.'.join(name))}
    assert found == set(QUOTED), 'write Described(...)'

@pytest.mark.parametrize('name', modules, ids='.'.join)
def test_imports_earlier_chapters_only(name):
    later = [m for m in imported(name) if m != name and place(m) >= place(name)]
    assert not later, f'{modules[name].name} imports from {[modules[m].name for m in later]}'

@pytest.mark.parametrize('name', modules, ids='.'.join)
def test_takes_no_private_names_of_others(name):
    imports = [node for node in ast.walk(syntax_tree(name)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.level or (node.module or '').startswith(lib)]
    taken = [(node.module, a.name) for node in ours for a in node.names if re.match('_[^_]', a.name)]
    assert not taken
    known = {a.asname or a.name for node in ours for a in node.names}
    read = [node for node in ast.walk(syntax_tree(name)) if isinstance(node, ast.Attribute)]
    of_ours = [node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id in known]
    private = [attr for attr in of_ours if re.match('_[^_]', attr)]
    assert set(private) <= {'_fields', '_asdict', '_make', '_replace'}                  # which any NamedTuple has

def public_names(name):
    "What `__all__` of a module lists."
    assigned = [node for node in syntax_tree(name).body if isinstance(node, ast.Assign)]
    lists = [node.value for node in assigned if getattr(node.targets[0], 'id', '') == '__all__']
    return [n for value in lists for n in ast.literal_eval(value)]

def test_public_names_are_unique():
    "No two rooms give the same name to two things."
    seen = {}
    for name in modules:
        for n in public_names(name): seen.setdefault(n, []).append('.'.join(name))
    twice = {n: places for n, places in seen.items() if len(places) > 1 and n != 'main'}
    assert not twice

def test_there_is_a_chain_of_imports():
    assert ('data', 'files') in set(imported(('evaluation', 'scores')))
