"""The watchdog by itself, in processes of its own: when it bites, and when it does not."""

import re
import subprocess
import sys

import pytest

PROCESS = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from dqtrain.watchdog import Watchdog
watchdog = Watchdog(1.0, Path(sys.argv[1]) / "exits" / "stacks-rank-00000.txt", lambda: (print("hung", flush=True), os._exit(75)))
def beats(number, pause=0.0):
    for _ in range(number):
        time.sleep(pause)
        watchdog.beat()
def a_place_to_hang():
    threading.Event().wait()
"""

HANGS = {
    "two threads": "beats(2)\nthreading.Thread(target=a_place_to_hang, name='writer', daemon=True).start()\na_place_to_hang()",
    "full disk": "beats(2)\n(Path(sys.argv[1]) / 'exits').write_text('in the way')\na_place_to_hang()",
}
LIVES = {
    "before the first forward: data is prepared, models are loaded": "time.sleep(2)",
    "the first forward and backward may compile": "beats(1)\ntime.sleep(2)",
    "progress": "beats(8, 0.3)",
    "stopped": "beats(2)\nwatchdog.stop()\ntime.sleep(2)",
    "suspended as a whole": "beats(2)\ntime.sleep(0.3)\nsubprocess.Popen(['sh', '-c', f'sleep 3; kill -CONT {os.getpid()}'])\nos.kill(os.getpid(), signal.SIGSTOP)\nbeats(2, 0.3)",
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Name -> (exit code, what it printed, its folder)."""
    folders = {name: tmp_path_factory.mktemp("watchdog") for name in HANGS | LIVES}
    started = {
        name: subprocess.Popen([sys.executable, "-c", f"{PROCESS}{body}\nos._exit(0)", str(folders[name])], stdout=subprocess.PIPE, text=True)
        for name, body in (HANGS | LIVES).items()
    }
    said = {name: process.communicate(timeout=60)[0] for name, process in started.items()}
    return {name: (process.returncode, said[name], folders[name]) for name, process in started.items()}


def test_a_hang_ends_with_the_stack_of_every_thread(ended):
    code, said, folder = ended["two threads"]
    assert (code, said) == (75, "hung\n")
    text = (folder / "exits" / "stacks-rank-00000.txt").read_text()
    assert set(re.findall("^thread (.*):$", text, re.MULTILINE)) == {"MainThread", "watchdog", "writer"}
    assert text.count("a_place_to_hang") == 2
    assert [path.name for path in (folder / "exits").iterdir()] == ["stacks-rank-00000.txt"]


def test_a_disk_that_takes_no_stacks_changes_nothing(ended):
    assert ended["full disk"][:2] == (75, "hung\n")


@pytest.mark.parametrize("name", LIVES)
def test_what_is_no_hang(ended, name):
    code, said, folder = ended[name]
    assert (code, said) == (0, "")
    assert not (folder / "exits").exists()
