"Every chapter runs from top to bottom, as `nbdev_test` runs it; here beside the other tests, so that no core waits."
import nbdev.test, pytest
from nbdev.config import get_config
from readme import root
from test_notebooks import chapters

@pytest.mark.parametrize('path', chapters, ids=lambda p: str(p.relative_to(root)))
def test_chapter(runner, path):
    flags = get_config(path=root).tst_flags.split()
    passed, seconds = runner.submit(nbdev.test.test_nb, path, skip_flags=flags, basepath=root).result()
    assert passed
    if not seconds: pytest.skip('the chapter says skip_exec: true')
