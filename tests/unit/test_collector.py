"""The garbage collector of a command: quiet during imports, as usual afterwards, and never in a library's process."""

import gc
import subprocess
import sys

import pytest

from joyjax.commands import collector


@pytest.fixture
def usual():
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)
    gc.unfreeze()


def test_the_collector_is_quiet_until_a_model_is_loaded(usual):
    collector.quiet()
    assert gc.isenabled()
    assert gc.get_threshold()[0] > usual[0]
    collector.settle()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 0


def test_later_garbage_is_collected(usual):
    collector.quiet()
    collector.settle()
    cycle: list = []
    cycle.append(cycle)
    del cycle
    assert gc.collect() > 0


def test_a_process_that_is_no_command_is_left_alone(usual):
    collector.settle()
    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() == 0


def test_handlers_run_and_streams_are_flushed_at_exit():
    program = (
        "import atexit, gc, sys; sys.argv[1:] = ['--version']; from joyjax.__main__ import main\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0, end='')); main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.split("\n")[1] == "frozen True"
