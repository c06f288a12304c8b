"The cache of answers: what is kept survives the process, whenever it ends, and costs the same however much there is."
import os, signal, sqlite3
import psutil, pytest
from mt_editflow_nb.data.files import InputError
from mt_editflow_nb.rewards import cache, servers
from mt_editflow_nb.rewards.cache import Cached, add_replies, copy_cache, merge_caches, new_replies
from mt_editflow_nb.rewards.engines import Ask, Reply

class Says:
    "An engine that answers at once, and does something before that."
    model = identity = 'says'
    def __init__(self, words='yes', before=lambda calls: None):
        self.words = words
        self.before = before
        self.calls = 0
    def __call__(self, asks):
        self.before(self.calls)
        self.calls += len(asks)
        return [Reply(self.words, tokens=8) for _ in asks]

def asks_of(numbers): return [Ask((), f'question {i}') for i in numbers]

def end(): os.kill(os.getpid(), signal.SIGKILL)

def asked_in_a_process(work):
    "Run `work` in a copy of this process; returns the signal that has ended it."
    child = os.fork()
    if not child:
        try: work()
        finally: os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def counts(file):
    with sqlite3.connect(file) as db:
        return [db.execute(f'select count(*) from {table}').fetchone()[0] for table in ('replies', 'recent', 'answers')]

def test_a_killed_process_has_kept_what_was_answered(tmp_path, monkeypatch):
    "All but the last 256 calls; also where it is killed while answers move into the index."
    monkeypatch.setattr(cache, 'FEWEST_INDEXED', 1000)                  # the fifth piece of 256 finds more than that
    def before(calls):
        if calls == 6*256: end()
    file = tmp_path/'judge.sqlite'
    assert asked_in_a_process(lambda: Cached(Says(before=before), file)(asks_of(range(5000)))) == signal.SIGKILL
    assert counts(file) == [5*256, 256, 6*256]
    again = Cached(Says('no'), file)                                    # at the next start, all move
    assert [r.text for r in again(asks_of(range(6*256 + 2)))] == ['yes']*6*256 + ['no']*2 and again.calls == 2
    assert counts(file) == [6*256, 2, 6*256 + 2]

    move = cache.index_recent
    def moved_in_vain(db):
        move(db)
        end()
    monkeypatch.setattr(cache, 'index_recent', moved_in_vain)
    engine = Cached.__new__(Cached)                                     # as a process that has begun before
    engine.__dict__.update(again.__dict__)
    assert asked_in_a_process(lambda: engine(asks_of(range(2000, 7000)))) == signal.SIGKILL
    assert counts(file) == [6*256, 2 + 5*256, 11*256 + 2]

def test_processes_that_share_a_file_see_what_others_have_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'FEWEST_INDEXED', 300)
    file = tmp_path/'judge.sqlite'
    one = Cached(Says('one'), file)
    two = Cached(Says('two'), file)
    for start in range(0, 1000, 100):
        assert {r.text for r in one(asks_of(range(start, start + 100)))} == {'one'}
        assert {r.text for r in two(asks_of(range(start, start + 100)))} == {'one'}
    assert two.calls == 0 and counts(file)[2] == 1000
    one.forget(asks_of([3, 990]))                                       # one is indexed, one is not
    assert [r.text for r in two(asks_of([3, 990, 4]))] == ['two', 'two', 'one']
    assert [r.text for r in one(asks_of([3, 990, 4]))] == ['two', 'two', 'one'] and one.calls == 1000

def test_a_copy_gives_what_came_after_it_indexed_or_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'FEWEST_INDEXED', 300)
    first = tmp_path/'judge.sqlite'
    second = tmp_path/'copy.sqlite'
    Cached(Says(), first)(asks_of(range(10)))
    copy_cache([first.read_bytes()], second)
    assert new_replies(second) == []
    copied = Cached(Says(), second)
    copied(asks_of(range(400)))
    assert counts(second) == [10, 390, 400] and len(new_replies(second)) == 390
    copied(asks_of(range(400, 500)))
    assert counts(second) == [500, 0, 500] and len(new_replies(second)) == 490
    assert merge_caches(first, [second]) == 490 and counts(first) == [500, 0, 500]
    assert [row[0] for row in new_replies(second)] == sorted(row[0] for row in new_replies(second))

def test_a_file_of_an_earlier_version_is_gone_on_with(tmp_path):
    "It had one table."
    file = tmp_path/'judge.sqlite'
    with sqlite3.connect(file) as db:
        db.execute('create table replies (key text primary key, model text, prompt text, seed integer, answer text, '
                   'probs text, tokens integer, seconds real)')
        for ask in asks_of(range(3)):
            row = ask.key('says'), 'says', ask.text, 0, 'before', '{}', 1, .1
            db.execute('insert into replies values (?,?,?,?,?,?,?,?)', row)
    assert [r.text for r in Cached(Says(), file, offline=True)(asks_of(range(3)))] == ['before']*3
    assert len(new_replies(file)) == 3
    engine = Cached(Says(), file)
    assert [r.text for r in engine(asks_of(range(4)))] == ['before']*3 + ['yes'] and engine.calls == 1
    assert counts(file) == [3, 1, 4]

@pytest.mark.skipif(not psutil.LINUX, reason='counts what the system has written for this process')
def test_bytes_written_for_an_answer_do_not_grow(tmp_path, monkeypatch):
    "Keys fall anywhere in the index: if each went there by itself, it would write pages of its own."
    monkeypatch.setattr(cache, 'FEWEST_INDEXED', 128)                   # in small files too, a sixteenth moves
    def bytes_of_an_answer(n):
        file = tmp_path/f'{n}.sqlite'
        rows = [(ask.key('says'), 'says', ask.text, 0, 'yes', '{}', 8, 0.) for ask in asks_of(range(n))]
        add_replies(file, sorted(rows))
        engine = Cached(Says(), file)
        more = max(2048, n//8)
        start = psutil.Process().io_counters().write_chars
        for i in range(n, n + more, 1024): engine(asks_of(range(i, i + 1024)))
        return (psutil.Process().io_counters().write_chars - start)/more
    few = bytes_of_an_answer(4096)
    many = bytes_of_an_answer(32768)
    print(f'{few:.0f} and {many:.0f} bytes')
    assert many < 1.5*few                                               # each at once: 3,800 and 9,100 bytes

def test_what_was_answered_before_the_quota_ended_is_kept(tmp_path, monkeypatch):
    "A key that is refused, or a quota at its end, loses no answer that has been paid for."
    asked = []
    async def answer(server, http, url, ask, pictures):
        asked.append(ask.text)
        if len(asked) > 30: raise InputError(f'judge: {url} has no quota left')
        return Reply('7', tokens=1000)
    monkeypatch.setattr(servers, 'ask_server', answer)
    monkeypatch.setattr(servers.Server, 'served', lambda self: {})
    engine = Cached(servers.Server('m', 'http://localhost:9/v1', concurrency=4), tmp_path/'judge.sqlite')
    with pytest.raises(InputError, match='has no quota left'): engine(asks_of(range(100)))
    paid = counts(tmp_path/'judge.sqlite')[-1]
    assert paid == 30
    asked.clear()
    again = engine(asks_of(range(30)))
    assert [reply.text for reply in again] == ['7']*30 and not asked
