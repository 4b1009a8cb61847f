"""A tiny checkpoint that has a tokenizer and a chat template, and one server of two stages for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.tokenizers_for_tests import byte_level, save
from server.process import ServerProcess
from tiny import tiny_checkpoint
from trireme.core.refusal import Refusal
from trireme.serve.text import Text
from trireme_tools.server_home import check_libraries, find_server

VOCAB = 420


def pytest_collection_modifyitems(items) -> None:
    here = Path(__file__).parent
    try:
        check_libraries(find_server())
        missing = ""
    except Refusal as refusal:
        missing = str(refusal)
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    directory = tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", vocab_size=VOCAB)
    return save(byte_level(), directory)


@pytest.fixture(scope="session")
def text(checkpoint) -> Text:
    text = Text.read(checkpoint)
    assert text is not None
    return text


@pytest.fixture(scope="session")
def server(checkpoint, tmp_path_factory) -> Iterator[ServerProcess]:
    server = ServerProcess(tmp_path_factory.mktemp("server"), model=str(checkpoint), pipeline_parallel_size=2).start()
    try:
        server.wait_ready()
        yield server
        assert server.metric("pages_used") == 0 and server.metric("requests_running") == 0
        server.stop(cancelled=True)
    finally:
        server.kill()
