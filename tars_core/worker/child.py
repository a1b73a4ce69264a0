"""The worker process: ``python -m tars_core.worker.child``, spoken to over its stdin and stdout."""

from __future__ import annotations

import os
import queue
import sys
import threading

from tars_core.system import processes
from tars_core.worker import protocol, requests, serving
from tars_core.worker.protocol import Hello

_READ_SIZE = 65_536
_UNLOAD_GRACE_S = 0.5
_SWITCH_S = 0.0005
"""A loop that decodes takes the GIL several times a step. While another thread renders a template or tokenises in
Python, each time costs up to this; Python's default is 5 ms."""


def main() -> None:
    """Serve until the host closes the pipe or is gone."""
    read, write = processes.claim_stdio()
    processes.exit_with_parent()
    sys.setswitchinterval(_SWITCH_S)
    inbox: requests.Inbox = queue.SimpleQueue()
    closing = threading.Event()
    lock = threading.Lock()
    ours = protocol.hello()

    def send(frame: protocol.WorkerFrame) -> None:
        data = memoryview(protocol.encode(frame))
        with lock:
            while data:
                data = data[os.write(write, data) :]

    def receive() -> None:
        frames = protocol.host_frames()
        try:
            while data := os.read(read, _READ_SIZE):
                for frame in frames.feed(data):
                    if not isinstance(frame, Hello):
                        inbox.put(frame)
                    elif frame.frames != ours.frames:
                        return  # what comes next cannot be read; the host has our greeting and says so
        finally:
            closing.set()
            inbox.put(None)
            # The main thread may be inside native code; the host is not to wait for it.
            threading.Timer(_UNLOAD_GRACE_S, os._exit, (0,)).start()

    try:
        send(ours)
        threading.Thread(target=receive, name="tars-receive", daemon=True).start()
        serving.serve(inbox, send, closing)
    except BrokenPipeError:
        os._exit(0)  # the host is gone
    # Not sys.exit: threads still inside native code abort the process at interpreter exit (seen with llama.cpp).
    os._exit(0)


if __name__ == "__main__":
    main()
