"""A server of vLLM in processes of its own, which can be stopped, killed and started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

# Two engines on one machine, and the tests beside them: nothing is bound to a core, and nothing is downloaded.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


class Server:
    """A vLLM server on a port that stays its own.

    Args:
        arguments: of vLLM's server module, with the model.
        log: where it writes.
        environment: further variables.
    """

    def __init__(self, arguments, log, environment=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        more = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
        module = "vllm.entrypoints.openai.api_server"
        self._command = [sys.executable, "-m", module, *arguments, *more, "--enforce-eager"]
        self._environment = {**os.environ, **ENVIRONMENT, **(environment or {})}

    def start(self):
        with self.log.open("a") as said:  # A session of its own, so that all its processes can be ended at once.
            self._process = subprocess.Popen(
                self._command, stdout=said, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            assert self._process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-5000:]
            time.sleep(0.5)

    def end(self, by=signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, by)
        self._process.wait(60)
