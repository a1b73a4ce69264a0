"""The worker process: ``python -m tars_core.worker.child``, spoken to over its stdin and stdout."""

from __future__ import annotations

import os
import queue
import threading

from tars_core import childprocess
from tars_core.worker import protocol, serving

_READ_SIZE = 65_536
_UNLOAD_GRACE_S = 0.5


def main() -> None:
    """Serve until the host closes the pipe or is gone."""
    read, write = childprocess.claim_stdio()
    childprocess.exit_with_parent()
    inbox: serving.Inbox = queue.SimpleQueue()
    closing = threading.Event()
    lock = threading.Lock()

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
                    inbox.put(frame)
        finally:
            closing.set()
            inbox.put(None)
            # The main thread may be inside native code; the host is not to wait for it.
            threading.Timer(_UNLOAD_GRACE_S, os._exit, (0,)).start()

    threading.Thread(target=receive, name="tars-receive", daemon=True).start()
    try:
        serving.serve(inbox, send, closing)
    except BrokenPipeError:
        os._exit(0)  # the host is gone
    # Not sys.exit: threads still inside native code abort the process at interpreter exit (seen with llama.cpp).
    os._exit(0)


if __name__ == "__main__":
    main()
