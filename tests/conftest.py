"Fixtures that several files of tests share."
import gc
from concurrent.futures import ProcessPoolExecutor
import pytest
from IPython.core.interactiveshell import InteractiveShell
from helpers import processes

def pytest_collection_finish():
    "What has been imported stays: a collection of garbage, half a second each time, need not look at it again."
    gc.freeze()

def prepare_runner():
    "Each notebook has a shell, and each shell collects garbage when the process ends: minutes for a hundred of them."
    gc.freeze()
    InteractiveShell.atexit_operations = lambda shell: None

@pytest.fixture(scope='session')
def runner():
    "A process that runs notebooks: what they leave behind stays away from the tests, and what they import stays there."
    with ProcessPoolExecutor(1, processes, prepare_runner) as pool: yield pool
