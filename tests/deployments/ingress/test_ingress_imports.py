"""The ingress starts in seconds and stays small because it imports no model library."""

from __future__ import annotations

import subprocess
import sys


def test_the_ingress_imports_no_model_library() -> None:
    program = (
        "import sys, deployments.ingress.deployment\n"
        "print(*sorted({'torch', 'vllm', 'transformers', 'serve_app'} & sys.modules.keys()))\n"
        "print('tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "\nTrue\n"
