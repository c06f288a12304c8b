"Fixtures that several files of tests share."
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import pytest

@pytest.fixture(scope='session')
def runner():
    "A process that runs notebooks: what they leave behind stays away from the tests, and what they import stays there."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool: yield pool
