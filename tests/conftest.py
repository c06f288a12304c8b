"Fixtures that several files of tests share."
from concurrent.futures import ProcessPoolExecutor
import pytest
from IPython.core.interactiveshell import InteractiveShell
from helpers import processes

def forget_shells():
    "Each notebook has a shell, and each shell collects garbage when the process ends: minutes for a hundred of them."
    InteractiveShell.atexit_operations = lambda shell: None

@pytest.fixture(scope='session')
def runner():
    "A process that runs notebooks: what they leave behind stays away from the tests, and what they import stays there."
    with ProcessPoolExecutor(1, processes, forget_shells) as pool: yield pool
