"Fixtures that several files of tests share."
import gc, os, signal
from mt_editflow_nb.data.files import skip_url_grammar
skip_url_grammar()                                 # before anything imports jsonschema
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
import pytest
from IPython.core.interactiveshell import InteractiveShell
from xdist.scheduler import LoadScopeScheduling
from helpers import processes

# Files whose tests share what takes long to make, and other tests that take longest. These begin first, so that in the
# end no core waits for one of them; a file of the first kind runs in one process, which makes what is shared once.
TOGETHER = ('test_browser', 'test_whole', 'test_training', 'test_recipes', 'test_families', 'test_package', 'test_push',
            'test_tracking', 'test_report')
LONG = ('test_ray', 'rewards/03_agreement', 'training/04_train', 'training/01_budget', 'evaluation/01_scores',
        'editing/05_loading', 'test_processes', 'explore/', 'evaluation/04_truth', 'editing/07_rollout',
        'algorithm/', 'cli/01e_eval', 'evaluation/', 'ablation/', 'test_sweeps')

# Hardly a test compiles anything; without a compiler for bitsandbytes' kernels, importing it takes seconds less.
os.environ['TORCHDYNAMO_DISABLE'] = '1'

# What a shell starts with & ignores Ctrl-C, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

def pytest_collection_modifyitems(items):
    first = TOGETHER + LONG
    def place(item): return next((i for i, part in enumerate(first) if part in item.nodeid), len(first))
    items.sort(key=place)

def pytest_xdist_make_scheduler(config, log):
    class Scheduling(LoadScopeScheduling):
        "A file of `TOGETHER`, or one test, is what a process takes next."
        def _split_scope(self, nodeid):
            file = Path(nodeid.partition('::')[0]).stem
            return file if file in TOGETHER else nodeid
    return Scheduling(config, log)

def pytest_collection_finish():
    """Tests load copies of the tiny editor.

    What has been imported stays: a collection of garbage, half a second each time, need not look at it again.
    The server that forks processes from itself finds what it imports, `preloaded`, in this folder."""
    import copied              # noqa: F401 imports torch, which the process that hands out tests does not need
    gc.freeze()
    paths = [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))

def prepare_runner():
    """Each notebook has a shell, and each shell collects garbage when the process ends: minutes for a hundred of them.

    What a cell returns is formatted for the output, and before that, figures too, by a hook that writes nothing."""
    from execnb.shell import CaptureShell
    gc.freeze()
    del os.environ['TORCHDYNAMO_DISABLE']                        # what a chapter compiles is compiled
    InteractiveShell.atexit_operations = lambda shell: None
    CaptureShell.displayhook_class.compute_format_data = lambda hook, result: ({}, {})

@pytest.fixture(scope='session')
def runner():
    "A process that runs notebooks: what they leave behind stays away from the tests, and what they import stays there."
    with ProcessPoolExecutor(1, processes, prepare_runner) as pool: yield pool
