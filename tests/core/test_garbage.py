"""What is there when a process is ready is no longer looked through; what comes later is."""

import gc
import weakref

from trireme.core.garbage import settle, unsettle


class Ring:
    def __init__(self):
        self.me = self


def test_later_garbage_is_still_found():
    stays = Ring()
    settle()
    try:
        assert gc.get_freeze_count() > 0 and not any(found is stays for found in gc.get_objects())
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None
    finally:
        unsettle()
    assert gc.get_freeze_count() == 0 and any(found is stays for found in gc.get_objects())
