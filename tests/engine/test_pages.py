"""Pages and prefix names: holders, reuse, and what goes first when space is short."""

from array import array

from trireme.engine.pages import Pages
from trireme.engine.prefix import extend_names, find_prefix


def test_take_hold_drop():
    pages = Pages(4)
    a = pages.take(3)
    assert (len(set(a)), pages.num_used, pages.num_free) == (3, 3, 1)
    pages.drop(a)
    assert pages.num_used == 0


def test_named_pages_are_kept_and_the_least_recent_go_first():
    pages = Pages(4)
    old, new = pages.take(2), pages.take(2)
    for page, name in zip(old + new, (b"o0", b"o1", b"n0", b"n1"), strict=True):
        pages.name(page, name)
    pages.drop(old)
    pages.drop(new)
    assert pages.num_free == 4 and pages.find(b"o1") == old[1]
    pages.take(1)
    assert pages.find(b"o1") is None and pages.find(b"o0") == old[0], "the end of a prefix goes before its beginning"
    pages.hold([old[0]])
    pages.take(2)
    assert pages.find(b"o0") == old[0] and pages.find(b"n0") is None and pages.num_free == 0


def test_one_name_one_page():
    pages = Pages(2)
    a, b = pages.take(2)
    pages.name(a, b"x")
    pages.name(b, b"x")
    assert pages.find(b"x") == a
    pages.drop([a, b])
    assert pages.num_free == 2


def test_names_stand_for_whole_prefixes():
    a, b, c = [], [], []
    extend_names(a, array("i", [1] * 48), 3)
    extend_names(b, array("i", [2] + [1] * 47), 3)
    extend_names(c, array("i", [1] * 32), 2)
    assert len(set(a + b)) == 6 and c == a[:2]


def test_find_prefix_leaves_a_token():
    pages = Pages(4)
    log, names = array("i", range(48)), []
    held = pages.take(3)
    extend_names(names, log, 3)
    for page, name in zip(held, names, strict=True):
        pages.name(page, name)
    assert find_prefix(pages, [], log) == held[:2]
    assert find_prefix(pages, [], array("i", range(49))) == held
    assert find_prefix(pages, [], array("i", range(1, 49))) == []
