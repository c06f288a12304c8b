"""A real JupyterLab in a real browser, used as a person would.

The tour is run, controls are moved, and what the page shows is read."""
import json, os, re, shutil, socket, subprocess, sys, urllib.request
import nbformat, pytest
from helpers import PATIENCE, wait_for
from readme import root

sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: make install')
chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(not chromium, reason='no Chromium here: as root, `make browser` installs it')

small = dict(look=4, iterations=2, eval_sessions=4, seeds=[0], out='tour')     # the tour's parameters, for a test
MILLISECONDS = 1000*PATIENCE

def settings(folder, theme):
    """JupyterLab's settings: a theme, no news, and every cell in the page.

    Nothing is saved but by the test's own hand: a save by the clock beside it makes JupyterLab ask which of the two
    stays, and a slow disk makes the time of writing later than the time it remembers."""
    extensions = {
        'apputils-extension/themes': dict(theme=theme),
        'docmanager-extension/plugin': dict(autosave=False, lastModifiedCheckMargin=MILLISECONDS),
        'apputils-extension/notification': dict(fetchNews='false'),
        'notebook-extension/tracker': dict(windowingMode='none')}
    for name, values in extensions.items():
        file = folder/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The tour with small parameters."
    folder = tmp_path_factory.mktemp('lab')
    nb = nbformat.read(root/'nbs/tutorials/tour.ipynb', 4)
    cell, = [c for c in nb.cells if 'parameters' in c.metadata.get('tags', ())]
    cell.source = '\n'.join(f'{k} = {v!r}' for k, v in small.items())
    sweep, = [c for c in nb.cells if 'fixed=dict(' in c.source]
    sweep.source = sweep.source.replace('fixed=dict(', 'fixed=dict(sessions_per_iteration=2, group=4, num_steps=2, ')
    members, = [c for c in nb.cells if 'group=16, num_steps=3' in c.source]
    members.source = members.source.replace('num_steps=3', 'num_steps=2')
    for c in nb.cells:
        if c.cell_type != 'code': continue
        c.outputs = []
        c.execution_count = None
    nbformat.write(nb, folder/'tour.ipynb')
    return folder

def wait_for_server(server, port, log):
    "Wait until the server answers."
    def answers():
        assert server.poll() is None, log.read_text()[-2000:]
        try: return urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=60)
        except OSError: return False
    wait_for(answers, every=.2)

# JupyterLab's own entry point, without two seconds of preparation that nobody needs
LAB = """
from mt_editflow_nb.data.files import skip_url_grammar
skip_url_grammar()
from jupyterlab.labapp import main
main()
"""

@pytest.fixture(scope='module')
def lab(folder):
    "The address of a server in that folder."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    settings(folder/'.settings', 'JupyterLab Light')
    env = dict(os.environ, JUPYTERLAB_SETTINGS_DIR=str(folder/'.settings'), JUPYTER_CONFIG_DIR=str(folder/'.config'),
               JUPYTER_RUNTIME_DIR=str(folder/'.runtime'), OMP_NUM_THREADS='1')
    command = [sys.executable, '-c', LAB, '--no-browser', f'--port={port}', '--IdentityProvider.token=',
               f'--ServerApp.root_dir={folder}', '--allow-root']
    with open(folder/'.log', 'w') as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            wait_for_server(server, port, folder/'.log')
            yield f'http://127.0.0.1:{port}'
        finally:
            server.terminate()
            server.wait(PATIENCE)

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-dev-shm-usage'])
        yield b
        b.close()

def opened(browser, lab, name):
    "A notebook in a page, when its kernel is ready."
    page = browser.new_page(viewport=dict(width=1250, height=1000))
    page.set_default_timeout(MILLISECONDS)
    page.goto(f'{lab}/lab/tree/{name}?reset')
    page.locator('.jp-Notebook .jp-CodeCell:visible').first.wait_for()   # those far from the view are hidden
    page.get_by_text('| Idle').wait_for()

    def accept(dialog): dialog.locator('.jp-mod-accept').last.click()     # which kernel? the one that is offered

    page.add_locator_handler(page.locator('.jp-Dialog'), accept)
    page.wait_for_timeout(1000)
    return page

def run_all(page):
    "Run all cells, and wait until all have run."
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    prompts = page.locator('.jp-CodeCell .jp-InputPrompt')
    errors = page.locator('.jp-OutputArea-output', has_text='Traceback (most recent call last)')
    def all_have_run():
        assert not errors.count(), errors.first.inner_text()
        return not any(re.fullmatch(r'\[[ *]\]:', t.strip()) for t in prompts.all_text_contents())
    wait_for(all_have_run, every=3)                             # each look makes the browser read the whole page

@pytest.fixture(scope='module')
def page(browser, lab):
    "The tour, run from top to bottom."
    page = opened(browser, lab, 'tour.ipynb')
    run_all(page)
    return page

def view(page, words):
    "What the cell shows whose source has these words."
    cell = page.locator('.jp-CodeCell', has=page.locator('.jp-InputArea', has_text=words))
    return cell.locator('.jp-OutputArea-child', has=page.locator('.mtef')).first

def choose(view, label, option): view.get_by_label(label, exact=True).select_option(label=option)

expect = sync_api.expect
expect.set_options(timeout=MILLISECONDS)

def shot(view, name):
    "A picture to look at, where somebody asks for pictures."
    to = os.environ.get('MTEF_SCREENSHOTS')
    if not to: return
    view.scroll_into_view_if_needed()
    view.screenshot(path=f'{to}/{name}.png')

def numbers(name, text): return [float(x) for x in re.findall(rf'{name} (\d\.\d\d)', text)]

def test_session_strip(page):
    v = view(page, 'explore_sessions(strips)')
    rows = v.locator('tbody tr')
    expect(rows).to_have_count(17)                              # what was intended, and sixteen members
    expect(rows.first).to_contain_text('intended')
    expect(rows.nth(1)).to_contain_text('member 0')
    choose(v, 'sort by', 'if')
    expect(rows.nth(1)).not_to_contain_text('member 0')
    means = [sum(numbers('if', t)) for t in rows.all_inner_texts()[1:]]
    assert means == sorted(means, reverse=True) and means[0] > means[-1]

    picture = rows.nth(1).locator('.pic').first
    over = picture.locator('.over')
    expect(over).to_be_hidden()
    picture.hover()
    expect(over).to_be_visible()                                # the difference, under the mouse
    page.mouse.move(0, 0)
    expect(over).to_be_hidden()
    picture.focus()
    expect(over).to_be_visible()                                # or with the keyboard
    assert 'followed' in picture.locator('img').first.get_attribute('alt')

    before = picture.locator('img').first.get_attribute('src')
    v.get_by_label('differences').check()
    expect(picture.locator('img').first).not_to_have_attribute('src', before)
    v.get_by_label('differences').uncheck()
    head = v.locator('thead').inner_text()
    v.get_by_label('session', exact=True).focus()
    page.keyboard.press('ArrowDown')                            # another session, without the mouse
    expect(v.locator('thead')).not_to_have_text(head)
    v.get_by_label('intended').uncheck()
    expect(rows.first).not_to_contain_text('intended')
    v.get_by_label('intended').check()
    expect(rows.first).to_contain_text('intended')
    shot(v, 'session_strip')

def test_reward_bench(page):
    v = view(page, 'bench = explore_rewards')
    choose(v, 'member', 'member 3')
    expect(v.locator('th', has_text='direct')).to_be_hidden()
    v.get_by_role('button', name='score').click()
    for mode in ('exact verifier', 'direct', 'logit'): expect(v.locator('th', has_text=mode)).to_be_visible()
    v.get_by_label('checklist').check()
    v.get_by_label('prompt', exact=True).fill('was it done at all ?')
    page.keyboard.press('Tab')
    expect(v.locator('th', has_text='direct')).to_be_hidden()   # nobody has been asked that yet
    v.get_by_role('button', name='score').click()
    expect(v.locator('th', has_text='checklist')).to_be_visible()
    v.locator('summary').first.click()
    expect(v.locator('pre', has_text='was it done at all ?').first).to_be_visible()
    choose(v, 'turn', '2')
    expect(v.get_by_label('prompt', exact=True)).not_to_have_value('was it done at all ?')
    choose(v, 'turn', '1')
    expect(v.locator('th', has_text='direct')).to_be_visible()  # what was scored is kept
    shot(v, 'reward_bench')

def test_advantage_lab(page):
    v = view(page, 'explore_advantages(scores)')
    expect(v.locator('tbody tr')).to_have_count(16)
    choose(v, 'compare with', 'mt-editflow')
    expect(v.locator('p').last).to_contain_text(' 0 have another sign')
    before = v.locator('tbody').inner_text()
    choose(v, 'aggregation', 'min')
    expect(v.locator('p').first).to_contain_text('min')
    expect(v.locator('tbody')).not_to_have_text(before)
    expect(v.locator('p').last).not_to_contain_text(' 0 have another sign')
    up = int(re.search(r'(\d+) of', v.locator('p').last.inner_text())[1])
    assert 0 < up < 4*16*3 and '▲' in v.inner_text() and '▼' in v.inner_text()
    shot(v, 'advantage_lab')
    choose(v, 'aggregation', 'none')
    expect(v.get_by_role('alert')).to_contain_text('collapses turns')     # said, not drawn
    choose(v, 'preset', 'edit-r2')
    expect(v.locator('p').first).to_contain_text('after the first failed turn')

def test_editor_playground(page):
    v = view(page, 'play = explore_editor')
    expect(v.locator('tbody tr')).to_have_count(3)              # two editors, and what was intended
    expect(v.locator('thead th')).to_have_count(4)              # two turns
    slider = v.locator('.noUi-handle')
    slider.focus()
    page.keyboard.press('ArrowRight')
    expect(v.locator('.widget-readout')).to_have_text('4')
    v.get_by_label('instruction').fill('change the background to white')
    v.get_by_role('button', name='edit', exact=True).click()
    expect(v.locator('thead th')).to_have_count(5)
    expect(v.locator('thead')).to_contain_text('3. change the background to white')
    v.get_by_role('button', name='undo').click()
    expect(v.locator('thead th')).to_have_count(4)
    shot(v, 'editor_playground')

    v.get_by_role('button', name='start again').click()
    expect(v.locator('thead')).to_have_count(0)
    first = v.locator('.pic img').first.get_attribute('src')
    v.locator('select').nth(4).select_option(label='pink cross')
    expect(v.locator('.pic img').first).not_to_have_attribute('src', first)     # draws the scene
    v.get_by_role('button', name='suggest').click()
    expect(v.get_by_label('instruction')).not_to_have_value('change the background to white')
    v.get_by_role('button', name='edit', exact=True).click()
    expect(v.locator('tbody tr')).to_have_count(3)
    with page.expect_file_chooser() as chooser: v.get_by_text('open a picture').click()
    chooser.value.set_files(root/'experiments/results/demo_sessions.png')
    expect(v.locator('thead')).to_have_count(0)                 # a picture from the disk, and turns begin anew
    expect(v.get_by_label('instruction')).not_to_have_value('')

def test_training_monitor(page):
    v = view(page, 'explore_training({')
    for label in ('cautious, seed 0', 'bold, seed 0'):
        row = v.locator('tr', has=page.locator('th', has_text=label))
        expect(row).to_contain_text('2 of 2')
    expect(v.locator('tbody tr')).to_have_count(2)
    expect(v.locator('tbody')).to_contain_text('finished')
    assert v.locator('img').first.evaluate('i => i.complete && i.naturalWidth > 500')
    shot(v, 'training_monitor')
    choose(v, 'sessions of', 'bold, seed 0')
    expect(v.locator('p')).to_contain_text('iteration 1 of bold')
    expect(v.get_by_alt_text('the members of one session')).to_be_visible()
    v.get_by_label('runs').select_option(label='bold, seed 0')
    expect(v.locator('tbody tr')).to_have_count(1)

def test_sweep_browser(page):
    v = view(page, 'explore_sweep(')
    expect(v.locator('tbody tr')).to_have_count(2)
    expect(v.locator('tbody')).to_contain_text('baseline')
    choose(v, 'score', 'CC')
    expect(v.locator('p').first).to_contain_text('CC at turn 3')
    choose(v, 'job', 'bold, seed 0')
    expect(v.locator('tr', has_text='after training')).to_be_visible()
    choose(v, 'lr', '0.001')
    expect(v.locator('.mtef').first.locator('tbody tr')).to_have_count(1)
    shot(v, 'sweep_browser')
    choose(v, 'job', 'bold, seed 0')
    v.get_by_role('link', name='job.ipynb').click()
    tab = page.locator('.lm-TabBar-tab', has_text='job.ipynb')
    expect(tab.first).to_be_visible()                           # its notebook opens beside the tour
    page.locator('.lm-TabBar-tab', has_text='tour.ipynb').first.click()

VIEWS = tuple(f'{name}(' for name in ('View', 'RewardBench', 'AdvantageLab', 'Playground', 'TrainingMonitor',
                                      'SweepBrowser'))

def views_in(file):
    "The outputs of a notebook that are views; none while it is being written."
    try: nb = nbformat.read(file, nbformat.NO_CONVERT)
    except ValueError: return []
    data = [o.data for c in nb.cells for o in c.get('outputs', []) if 'data' in o]
    return [d for d in data if d.get('text/plain', '').startswith(VIEWS)]

def test_what_is_saved(page, folder):
    "The saved notebook is valid where there are no widgets, and shows every view there."
    page.locator('.jp-Notebook').first.click(position=dict(x=5, y=5))
    page.keyboard.press('Control+s')
    wait_for(lambda: len(views_in(folder/'tour.ipynb')) == 7, every=.2)     # six, and the monitor once more
    nb = nbformat.read(folder/'tour.ipynb', nbformat.NO_CONVERT)
    nbformat.validate(nb)
    assert all('state' in w for w in nb.metadata.get('widgets', {}).values())
    views = views_in(folder/'tour.ipynb')
    assert len(views) == 7
    assert all('application/vnd.jupyter.widget-view+json' in data for data in views)
    assert all('image/png' in data for data in views)                       # also the monitor's, before training

CELLS = ["""from mt_editflow_nb.explore.live import explore_training
explore_training('live', every=.2)""",
         """import pathlib, time
import numpy as np
from mt_editflow_nb.data.shapeworld import shape_sessions, teacher_images
from mt_editflow_nb.rewards.engines import Reply
from mt_editflow_nb.rewards.judges import MODES
from mt_editflow_nb.rewards.cube import Judge, verifier
from mt_editflow_nb.explore.bench import explore_rewards
from mt_editflow_nb.explore.strips import Strips
class Slow:
    def __call__(self, asks):
        while not pathlib.Path('cancelled').exists(): time.sleep(.05)
        return [Reply('9', {'9': 1.}) for a in asks]
sessions = shape_sessions(2, 2)
images = np.stack([teacher_images(s) for s in sessions])[:, None]
explore_rewards(Strips(sessions, images, verifier(sessions, images)), Judge(Slow(), MODES['direct']))"""]

CONTRAST = """element => {
  const linear = x => { x /= 255; return x <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4 };
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(linear);
    return .2126*r + .7152*g + .0722*b };
  const text = luminance(getComputedStyle(element).color);
  const ground = luminance(getComputedStyle(element.closest('.jp-Notebook')).backgroundColor);
  return [(Math.max(text, ground) + .05)/(Math.min(text, ground) + .05), ground] }"""

def write_iteration(run, i):
    "What a run of thirty seconds an iteration leaves of one of them."
    timing = dict(iteration=i, seconds=30.)
    metrics = {'iteration': i, 'all_right': [.5], 'if': [.5], 'cc': [.9]}
    for name, row in (('timings', timing), ('metrics', metrics)):
        with open(run/f'{name}.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')

def test_live(browser, lab, folder):
    "A run is followed while it is written, a reload loses nothing, a slow model blocks nothing, the dark can be read."
    run = folder/'live'
    (run/'rollouts').mkdir(parents=True)
    (run/'config.json').write_text(json.dumps(dict(config=dict(iterations=9))))
    kernel = dict(name='python3', display_name='python3', language='python')
    cells = [nbformat.v4.new_code_cell(c) for c in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), folder/'live.ipynb')
    page = opened(browser, lab, 'live.ipynb')
    run_all(page)
    v = view(page, "explore_training('live'")
    expect(v.locator('tbody')).to_contain_text('0 of 9')
    write_iteration(run, 0)
    expect(v.locator('tbody')).to_contain_text('1 of 9')        # nobody has touched it
    expect(v.locator('tbody')).to_contain_text('4 min')

    b = view(page, 'class Slow')
    b.get_by_role('button', name='score').click()
    expect(b.get_by_role('button', name='cancel')).to_be_enabled()
    before = b.locator('.pic img').first.get_attribute('src')
    choose(b, 'session', '1: train-0-1')
    expect(b.locator('.pic img').first).not_to_have_attribute('src', before)     # while the judge sleeps
    b.get_by_role('button', name='cancel').click()
    expect(b.get_by_text('cancelling')).to_be_visible()         # the kernel knows of it before the judge is done
    (folder/'cancelled').touch()
    expect(b.get_by_text('cancelled')).to_be_visible()

    page.keyboard.press('Control+s')
    wait_for(lambda: len(views_in(folder/'live.ipynb')) == 2, every=.2)
    settings(folder/'.settings', 'JupyterLab Dark')
    page.reload()
    page.locator('.jp-Notebook .jp-CodeCell:visible').first.wait_for()   # those far from the view are hidden
    page.get_by_text('| Idle').wait_for()
    write_iteration(run, 1)
    expect(view(page, "explore_training('live'").locator('tbody')).to_contain_text('2 of 9')
    contrast, ground = view(page, "explore_training('live'").locator('.mtef').first.evaluate(CONTRAST)
    assert ground < .05 and contrast > 4.5                      # WCAG's for text
    shot(view(page, "explore_training('live'"), 'dark')
    (run/'results.json').write_text('{}')
    expect(view(page, "explore_training('live'").locator('tbody')).to_contain_text('finished')
